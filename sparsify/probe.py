"""What a piece of graph does to positions: labels pushed through moves, gradients through the rest.

A fused or reshaped projection is understood by running it, not by patterns: integer labels pushed
through views, splits and transposes say where each element comes from; gradients say which rows a
head depends on where rotations and norms lie between. Both run on tiny tensors of the example's
shapes, so they work for any spelling.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

MOVEMENT = frozenset(
    "view _unsafe_view reshape flatten unflatten transpose permute t numpy_T contiguous clone "
    "detach alias slice select split split_with_sizes chunk unbind unsqueeze squeeze expand "
    "repeat repeat_interleave narrow swapaxes movedim mT lift_fresh_copy view_as expand_as "
    "reshape_as".split()
)
IDENTITY = frozenset("dropout dropout_ alias detach contiguous clone lift_fresh_copy".split())
CASTS = frozenset("to _to_copy type_as".split())


def op_base(node: fx.Node) -> str:
    """``aten.mul.Tensor`` -> ``mul``, ``operator.getitem`` -> ``getitem``, else the name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def is_movement(node: fx.Node) -> bool:
    """The node only moves elements (views, splits, transposes, copies)."""
    return node.op == "call_function" and (
        op_base(node) in MOVEMENT or node.target is operator.getitem
    )


def is_identity(node: fx.Node) -> bool:
    """In evaluation mode the node returns its input unchanged."""
    return node.op == "call_function" and op_base(node) in IDENTITY


def is_cast(node: fx.Node) -> bool:
    """The node changes dtype only."""
    return node.op == "call_function" and op_base(node) in CASTS


def is_pointwise(node: fx.Node) -> bool:
    """Each output element depends on the same position of each input only."""
    target = node.target
    if node.op != "call_function":
        return False
    if is_identity(node) or is_cast(node):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The node's shape on the example."""
    return tuple(node.meta.get("shape", ()))


class NotFollowed(Exception):
    """A chain between two nodes cannot be run on labels."""


def push(start: fx.Node, value: Tensor, end: fx.Node, *, movement_only: bool = True) -> Any:
    """Run the nodes between ``start`` and ``end`` with ``value`` in place of ``start``'s result.

    Args:
        start, end: nodes of one graph; ``end`` depends on ``start``.
        value: replaces ``start``'s result; has its example shape.
        movement_only: refuse anything but data movement (needed for integer labels). Otherwise
            operands from elsewhere are replaced by random numbers of their example shape.

    Raises:
        NotFollowed: with the operation that stands in the way.
    """
    done: dict[fx.Node, Any] = {start: value}
    generator = torch.Generator().manual_seed(0)

    def outside(node: fx.Node) -> Any:
        if "int" in node.meta:
            return node.meta["int"]
        if movement_only:
            raise NotFollowed(f"{op_base(node)} ({node.name})")
        shape = shape_of(node)
        dtype = node.meta.get("dtype", torch.float32)
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        noise = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        return noise.to(value.dtype)

    order = chain(start, end)
    if end is not start and (not order or order[-1] is not end):
        raise NotFollowed(f"{end.name} does not depend on {start.name}")
    inside = set(order)
    for node in order:
        if movement_only and not (is_movement(node) or is_identity(node) or is_cast(node)):
            raise NotFollowed(f"{op_base(node)} ({node.name})")

        def load(arg: fx.Node) -> Any:
            if arg in done:
                return done[arg]
            if arg in inside:
                raise NotFollowed(arg.name)
            return outside(arg)

        args: Any = fx.map_arg(node.args, load)
        kwargs: Any = fx.map_arg(node.kwargs, load)
        if is_identity(node) or is_cast(node):
            done[node] = args[0]  # dropout is off, and labels keep their own dtype
            continue
        if op_base(node) in ("view", "_unsafe_view"):  # the probe's strides may differ
            done[node] = args[0].reshape(args[1])
            continue
        if not callable(node.target):
            raise NotFollowed(f"{node.op} {node.target}")
        done[node] = node.target(*args, **kwargs)
    return done[end]


def chain(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes on any path from ``start`` (excluded) to ``end`` (included), in graph order."""
    up: set[fx.Node] = set()
    stack = [end]
    limit = _order(start)
    while stack:
        node = stack.pop()
        if node in up or node is start or _order(node) <= limit:
            continue
        up.add(node)
        stack.extend(node.all_input_nodes)
    reached: set[fx.Node] = {start}
    ordered = []
    for node in sorted(up, key=_order):
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
            ordered.append(node)
    return ordered


def _order(node: fx.Node) -> int:
    return int(node.meta["order"])


def rows_by_last_dim(start: fx.Node, end: fx.Node) -> Tensor:
    """Which features of ``start`` stand in the last dimension of ``end``: int64 (F,)."""
    shape = shape_of(start)
    labels = torch.arange(shape[-1]).expand(shape)
    out = push(start, labels, end)
    if not isinstance(out, Tensor):
        raise NotFollowed(f"{end.name} is not a tensor")
    flat = out.reshape(-1, out.shape[-1])
    if not bool((flat == flat[0]).all()):
        raise NotFollowed(f"the features of {end.name} depend on the position")
    return flat[0].clone()


def head_columns(attend: fx.Node, context: fx.Node) -> Tensor:
    """Where each (head, feature) of ``attend`` (B, H, T, dv) stands in ``context`` (..., H*dv).

    Returns:
        int64 (H, dv): columns of the output projection's input.
    """
    shape = shape_of(attend)
    heads, width = shape[1], shape[3]
    labels = torch.arange(heads * width).view(1, heads, 1, width).expand(shape)
    out = push(attend, labels, context)
    flat = out.reshape(-1, out.shape[-1])
    if flat.shape[-1] != heads * width or not bool((flat == flat[0]).all()):
        raise NotFollowed("heads are mixed before the output projection")
    columns = torch.empty(heads * width, dtype=torch.int64)
    columns[flat[0]] = torch.arange(heads * width)
    return columns.view(heads, width)


def pairs_in_order(attend: fx.Node, context: fx.Node, tokens_first: bool) -> bool:
    """Whether the rows of ``context`` (..., F) are the pairs of ``attend`` (B, H, T, dv) in order.

    Args:
        tokens_first: the order is (T, B), else (B, T).
    """
    batch, _, tokens, _ = shape = shape_of(attend)
    pairs = torch.arange(batch * tokens).view(batch, tokens)
    out = push(attend, pairs.view(batch, 1, tokens, 1).expand(shape), context)
    wanted = (pairs.t() if tokens_first else pairs).reshape(-1)
    return torch.equal(out.reshape(-1, out.shape[-1])[:, 0], wanted)


def time_major(node: fx.Node, heads_node: fx.Node) -> bool:
    """Whether rows of ``node`` (..., F) run over tokens first: (T, B) for heads (B, H, T, d).

    Told by the gradient of one (batch, token) pair; where the example has one row or one token, by
    the shapes.

    Raises:
        NotFollowed: the pair comes from several rows, or from one of neither order.
    """
    shape, (batch, _, tokens, _) = shape_of(node), shape_of(heads_node)
    if batch == 1 or tokens == 1:
        return tokens != batch and shape[:2] == (tokens, batch)
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        out = push(node, value, heads_node, movement_only=False)
        pair = out[batch - 1, :, 0].square().sum()
        (gradient,) = torch.autograd.grad(pair, value)
    rows = gradient.reshape(-1, shape[-1]).abs().amax(1).nonzero().flatten().tolist()
    if rows not in ([(batch - 1) * tokens], [batch - 1]):
        raise NotFollowed(f"a query of {heads_node.name} comes from rows {rows} of {node.name}")
    return rows == [batch - 1]


def head_rows(projection: fx.Node, heads_node: fx.Node) -> Tensor:
    """Which features of ``projection`` (..., out) each head of ``heads_node`` (B, H, T, d) reads.

    Found by gradients of each head's sum, so rotations, norms per head and scales may lie between.

    Returns:
        int64 (H, r), rows in ascending order.

    Raises:
        NotFollowed: heads share rows (a norm over all heads, say) or read unequal numbers of rows.
    """
    shape = shape_of(projection)
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        out = push(projection, value, heads_node, movement_only=False)
        if not isinstance(out, Tensor) or out.dim() != 4 or not out.requires_grad:
            raise NotFollowed(f"{heads_node.name} is not (batch, head, token, feature)")
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        per_head = (out * weight).sum(dim=(0, 2, 3))
        eye = torch.eye(out.shape[1], dtype=torch.float64)
        found = [
            torch.autograd.grad(per_head, value, unit, retain_graph=True)[0].reshape(-1, shape[-1])
            for unit in eye
        ]
    used = torch.stack([g.abs().amax(0) > 0 for g in found])  # (H, out)
    counts = used.sum(1)
    if int(used.sum(0).max()) > 1:
        raise NotFollowed("heads share rows of the projection (an operation mixes heads)")
    if int(counts.min()) != int(counts.max()) or int(counts.min()) == 0:
        raise NotFollowed("heads read unequal numbers of rows")
    return torch.stack([u.nonzero().flatten() for u in used])


def annotate(gm: fx.GraphModule, example: tuple[Any, ...]) -> dict[fx.Node, Any]:
    """Run the graph once on the example; note order, shape, dtype and integer values on each node.

    Returns the values of the nodes marked ``meta["keep"]`` and of the graph output.
    """
    kept: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            note(n, value)
            if n.meta.get("keep") or n.op == "output":
                kept[n] = value
            return value

    for order, node in enumerate(gm.graph.nodes):
        node.meta["order"] = order
    with torch.no_grad():
        Recorder(gm).run(*example)
    return kept


def note(node: fx.Node, value: Any) -> None:
    """Write what ``value`` shows about its node into ``node.meta``."""
    if isinstance(value, Tensor):
        node.meta["shape"] = tuple(value.shape)
        node.meta["dtype"] = value.dtype
    elif isinstance(value, int | float | bool):
        node.meta["int"] = value


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """The parameter, buffer or module at a dotted name."""
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part)
    return found


def source_line(meta: Mapping[str, Any]) -> str:
    """``file.py:line   text``: the deepest frame of the node's trace outside torch, else any."""
    trace = str(meta.get("stack_trace") or "")
    found, library = "", ""
    lines = trace.splitlines()
    for at, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith('File "'):
            parts = stripped.split('"')
            name = parts[1].rpartition("/")[2]
            number = parts[2].split("line ")[-1].split(",")[0]
            text = lines[at + 1].strip() if at + 1 < len(lines) else ""
            library = f"{name}:{number}   {text}"
            found = library if "/torch/" not in stripped else found
    return found or library
