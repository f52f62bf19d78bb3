"""Take the body of a layer out of the graph, so that it can run on some of the tokens.

What the body reads from outside becomes its inputs: the stream, masks and rotations (with the
meaning of each of their dimensions), cached keys and values, weights. Sizes that the body names
(views, expansions) become functions of three numbers: rows, tokens and cached tokens.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from sparsify.blocks import above, below
from sparsify.core import Refused
from sparsify.layers import between, slots_of
from sparsify.probe import attribute, op_base, shape_of
from sparsify.regions import Attention, Layer
from sparsify.runtime.graph import attach
from sparsify.runtime.spec import is_routed

_SIZED = ("reshape", "view", "_unsafe_view", "expand", "unsafe_view", "repeat", "broadcast_to")


@dataclasses.dataclass
class Body:
    """A layer's body, and what it is called with.

    Attributes:
        graph, inner: for RoutedLayer; inputs: nodes of the outer graph, the stream first.
        axes, slots, keys, flops, weight_bytes, attention: see RoutedLayer.
        moved: path of a routed module in the outer graph -> its path under ``inner``.
    """

    graph: fx.Graph
    inner: nn.Module
    inputs: list[fx.Node]
    axes: list[str]
    slots: list[tuple[int, int]]
    keys: tuple[int, int] | None
    flops: float
    weight_bytes: float
    attention: tuple[float, float]
    moved: dict[str, str]


def take_body(layer: Layer, source: Layer | None = None) -> Body:
    """The layer's body; its site then knows the nodes it replaces.

    Args:
        source: the layer whose keys and values this one attends to, those of all tokens: an
            earlier one, or the layer itself (they are computed outside the body then); None =
            those of the live tokens, computed in the body.

    Raises:
        Refused: the body cannot run on some of the tokens.
    """
    gm, x, y = layer.gm, layer.ports["x"], layer.ports["y"]
    leaves = slots_of(between(x, y), y)
    given = {} if source is None else shared_entries(layer, source, leaves)
    inside = between(x, y, given)
    nodes = [n for n in gm.graph.nodes if n in inside and n.op != "get_attr"]
    outside = {n for entry in given for n in above(entry, (x,))}
    if any(n.op == "call_module" and n in outside for n in nodes):
        raise Refused("one routed module gives queries and keys: they cannot run apart")
    sizes = _Sizes(x, leaves)
    inputs = [x]
    for node in nodes:
        for read in node.all_input_nodes:
            given_to_it = read not in inside or read.op == "get_attr"
            if given_to_it and read not in inputs and not _is_int(read):
                inputs.append(read)
    axes = [sizes.axes(node) for node in inputs]
    keys = None
    if given:  # every token attends to all keys, whoever else is live
        leaves = ()
        at = next(i for i, node in enumerate(inputs) if node in given)
        keys = (at, axes[at].index("k"))
        axes = [letters.replace("k", ".") for letters in axes]
    graph = fx.Graph()
    made = {name: graph.placeholder(name) for name in ("rows", "tokens", "past")}
    values: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        values[node] = graph.placeholder(f"in_{number}")
    inner = nn.Module()
    moved: dict[str, str] = {}
    flops = weight_bytes = 0.0
    for node in nodes:
        for read in node.all_input_nodes:
            if read not in values:
                values[read] = sizes.number(read, graph, made, values)
        copy = graph.node_copy(node, lambda n: values[n])
        _resize(copy, node, sizes, made)
        copy.meta = {k: v for k, v in node.meta.items() if k in ("casts", "captured")}
        if node.op == "call_module":
            path = str(node.target)
            module = gm.get_submodule(path)
            if not is_routed(module):
                raise Refused(f"{path} is no routed module")
            moved[path] = _relative(path, layer.path)
            copy.target = moved[path]
            attach(inner, moved[path], module)
        else:
            extra = _weights(gm, node)
            flops += 2 * extra[0]
            weight_bytes += extra[1]
        values[node] = copy
    graph.output(tuple(values[n] for n in (y, *leaves)))
    grown: list[Any] = [leaf.args[0] for leaf in leaves]
    slots = [
        (inputs.index(parts[0]), _axis(leaf)) for parts, leaf in zip(grown, leaves, strict=True)
    ]
    if any(axes[at][dim] != "s" for at, dim in slots):
        raise Refused("the cached tokens' dimension is not known")
    for site in layer.sites.values():
        site.nodes = tuple(nodes)
        site.extra = leaves
    inputs = [given.get(node, node) for node in inputs]
    attention = _attention(layer)
    return Body(graph, inner, inputs, axes, slots, keys, flops, weight_bytes, attention, moved)


def shared_entries(
    layer: Layer, source: Layer, leaves: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The layer's cache entries -> those of ``source`` that stand in for them.

    Raises:
        Refused: the layer does not attend to its cache entries as they are.
    """
    found: dict[fx.Node, fx.Node] = {}
    for mine, theirs in zip(layer.inside, source.inside, strict=True):
        if not isinstance(mine, Attention) or not isinstance(theirs, Attention):
            continue
        if mine.rewritten_by is not None or theirs.rewritten_by is not None:
            raise Refused(f"{mine.path} is rewritten: its keys and values cannot be shared")
        found |= {mine.ports[port]: theirs.ports[port] for port in ("k", "v")}
    if not leaves or set(found) != set(leaves):
        raise Refused(
            "its attention does not read a key/value cache as it is: nothing to share",
            suggestion="kv=recursion",
        )
    for node in below(layer.ports["x"]) & above(layer.ports["y"]):
        causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
        if op_base(node) == "scaled_dot_product_attention" and causal is not False:
            raise Refused(
                "its attention takes the order of tokens from their number, not from a mask",
                suggestion="kv=recursion",
            )
    return found


def hand_over(layer: Layer, source: Layer) -> None:
    """Let the graph's outputs take the cache entries of ``source`` for those of ``layer``."""
    y = layer.ports["y"]
    inside = between(layer.ports["x"], y)
    given = shared_entries(layer, source, slots_of(inside, y))
    for mine, theirs in given.items():
        for user in [user for user in mine.users if user not in inside]:
            user.replace_input_with(mine, theirs)


def _attention(layer: Layer) -> tuple[float, float]:
    """Multiply-adds and cache bytes per key of the layer's own dense attention."""
    flops = cache = 0.0
    for region in layer.inside:
        if isinstance(region, Attention) and region.rewritten_by is None:
            width = region.head_dim + region.value_dim
            flops += region.heads * width
            cache += region.kv_heads * width * region.query.weight.element_size()
    return flops, cache


def _weights(gm: fx.GraphModule, node: fx.Node) -> tuple[int, int]:
    """(elements, bytes) of the matrix that a node multiplies by."""
    if op_base(node) not in ("linear", "addmm", "mm", "matmul", "bmm"):
        return 0, 0
    for source in node.all_input_nodes:
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            value = attribute(gm, str(source.target))
            if isinstance(value, Tensor) and value.dim() == 2:
                return value.numel(), value.numel() * value.element_size()
    return 0, 0


def _relative(path: str, base: str) -> str:
    return path.removeprefix(f"{base.split('#')[0]}.")


def _axis(leaf: fx.Node) -> int:
    dim = leaf.args[1] if len(leaf.args) > 1 else leaf.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape_of(leaf))


def _is_int(node: fx.Node) -> bool:
    return "shape" not in node.meta and "int" in node.meta


class _Sizes:
    """What the sizes in a layer mean: rows, tokens, cached tokens."""

    def __init__(self, x: fx.Node, leaves: Sequence[fx.Node]) -> None:
        batch, tokens, width = shape_of(x)
        symbols = _symbols(x)
        self.known: dict[str, Any] = {"rows": symbols[0], "tokens": symbols[1]}
        self.plain = {"rows": batch, "tokens": tokens}
        self.total: tuple[str, ...] = ()
        if leaves:
            past: Any = leaves[0].args[0]
            dim = _axis(leaves[0])
            self.known["past"] = _symbols(past[0])[dim]
            a, b = str(self.known["past"]), str(symbols[1])
            self.total = (f"{a} + {b}", f"{b} + {a}")
        self.fixed = isinstance(symbols[1], int)  # the capture fixed the number of tokens
        if self.fixed and tokens in (width, batch):
            raise Refused(
                f"captured for {tokens} tokens only, which is also another size of the stream",
                suggestion="capture with an example of another number of tokens",
            )

    def axes(self, node: fx.Node) -> str:
        """One letter per dimension of an input."""
        shape = shape_of(node)
        if node.op == "get_attr":
            return "." * len(shape)
        found = "".join(
            self._axis(at, size, symbol)
            for at, (size, symbol) in enumerate(zip(shape, _symbols(node), strict=True))
        )
        if self.fixed and found.count("t") > 1 and found[-2:] != "tt":
            raise Refused(f"which dimension of {node.name} {shape} runs over tokens is not known")
        return found

    def _axis(self, at: int, size: int, symbol: Any) -> str:
        if size == 1 and isinstance(symbol, int):
            return "."
        if not isinstance(symbol, int):
            text = str(symbol)
            if at == 0 and text == str(self.known["rows"]):
                return "b"
            if text == str(self.known["tokens"]):
                return "t"
            if "past" in self.known and text == str(self.known["past"]):
                return "s"
            return "k" if text in self.total else "."
        if at == 0 and isinstance(self.known["rows"], int) and size == self.plain["rows"]:
            return "b"
        return "t" if self.fixed and size == self.plain["tokens"] else "."

    def number(
        self,
        node: fx.Node,
        graph: fx.Graph,
        made: dict[str, fx.Node],
        values: dict[fx.Node, fx.Node],
    ) -> fx.Node:
        """An int of the outer graph, computed from the sizes inside."""
        if node in values:
            return values[node]
        symbol = str(node.meta.get("val"))
        for name, known in self.known.items():
            if symbol == str(known) and not isinstance(known, int):
                return made[name]
        plain = node.target in (operator.add, operator.mul, operator.sub, operator.floordiv)
        if plain and all(_is_int(a) for a in node.all_input_nodes):
            for source in node.all_input_nodes:
                values[source] = self.number(source, graph, made, values)
            return graph.node_copy(node, lambda n: values[n])
        raise Refused(f"the size {node.name} follows neither from the rows nor from the tokens")


def _symbols(node: fx.Node) -> tuple[Any, ...]:
    """The node's sizes as the capture knows them: ints, or symbols where they may vary."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dim() == len(shape_of(node)):
        return tuple(value.shape)
    return shape_of(node)


def _resize(copy: fx.Node, node: fx.Node, sizes: _Sizes, made: dict[str, fx.Node]) -> None:
    """Replace a fixed number of tokens (or rows) in a view by the number inside."""
    if node.op != "call_function" or op_base(node) not in _SIZED:
        return
    wanted: Any = copy.args[1]
    if sizes.fixed and wanted.count(sizes.plain["tokens"]) > 1:
        raise Refused(f"which size of {node.name} {wanted} is the number of tokens is not known")
    fixed = {}
    if sizes.fixed:
        fixed[sizes.plain["tokens"]] = made["tokens"]
    wanted = [fixed.get(s, s) if isinstance(s, int) else s for s in wanted]
    if isinstance(sizes.known["rows"], int) and wanted[:1] == [sizes.plain["rows"]]:
        wanted[0] = made["rows"]
    copy.args = (copy.args[0], wanted, *copy.args[2:])
