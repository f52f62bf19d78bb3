"""Feed-forward layers by roles: up (and gate) -> elementwise -> down, added back to the stream.

Starting at each projection, walk up through elementwise nodes. It is the down projection of a
feed-forward layer if the walk ends at one or two projections of one input, passes a nonlinearity
on the way, and the result is added to a value that the input came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.linears import Linear, projections
from sparsify.probe import (
    NotFollowed,
    attribute,
    is_cast,
    is_identity,
    is_movement,
    is_pointwise,
    op_base,
    rows_by_last_dim,
    shape_of,
    source_line,
)
from sparsify.regions import FeedForward, LinearWeight, NearMiss, Site
from sparsify.runtime.codec import op_name
from sparsify.runtime.program import Program, Ref, Step

LINEAR_OPS = frozenset("mul mul_ div add add_ sub neg dropout to _to_copy".split())
NORMS = frozenset("layer_norm native_layer_norm rms_norm batch_norm group_norm".split())
# a tree that ends in one of these is a norm of the stream or an attention, not a hidden layer
NOT_HIDDEN = NORMS | frozenset(
    "mean var var_mean sum linalg_vector_norm softmax _softmax matmul bmm embedding "
    "scaled_dot_product_attention cat".split()
)
RESIDUAL_REACH = 12  # nodes followed from the result to the addition that closes the residual


class Missed(Exception):
    """A role failed."""

    def __init__(self, role: str, reason: str) -> None:
        super().__init__(reason)
        self.role = role
        self.reason = reason


@dataclasses.dataclass
class _Tree:
    """The elementwise nodes above a down projection, and the projections they start from."""

    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    leaves: dict[fx.Node, Linear] = dataclasses.field(default_factory=dict)
    moves: set[fx.Node] = dataclasses.field(default_factory=set)
    constants: list[fx.Node] = dataclasses.field(default_factory=list)
    foreign: list[fx.Node] = dataclasses.field(default_factory=list)


def _projection_of(
    node: fx.Node, linears: dict[fx.Node, Linear]
) -> tuple[Linear, list[fx.Node]] | None:
    """The projection that ``node`` is a part of, through splits and views."""
    passed = []
    while node not in linears:
        if not is_movement(node) or not isinstance(node.args[0], fx.Node):
            return None
        passed.append(node)
        node = node.args[0]
    return linears[node], passed


def _climb(gm: fx.GraphModule, start: fx.Node, linears: dict[fx.Node, Linear]) -> _Tree:
    tree = _Tree()
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        found = _projection_of(node, linears)
        if found is not None:
            tree.leaves[node] = found[0]
            tree.moves.update(found[1])
        elif is_pointwise(node):
            tree.nodes.append(node)
            stack.extend(node.all_input_nodes)
        elif node.op == "get_attr":
            tree.constants.append(node)
        elif "int" not in node.meta:
            tree.foreign.append(node)
    return tree


def _nonlinear(tree: _Tree) -> bool:
    return any(op_base(n) not in LINEAR_OPS and not is_identity(n) for n in tree.nodes)


def match_feed_forward(
    gm: fx.GraphModule, down: Linear, linears: dict[fx.Node, Linear]
) -> FeedForward | NearMiss | None:
    """The region that ends in ``down``, a near miss, or None where nothing suggests one."""
    tree = _climb(gm, down.x, linears)
    sources = list(dict.fromkeys(tree.leaves.values()))
    norm = next((n for n in tree.foreign if op_base(n) in NORMS), None)
    if norm is not None and not sources:
        inner = _climb(gm, norm.args[0], linears)  # type: ignore[arg-type]
        if inner.leaves and not inner.foreign and _nonlinear(inner):
            return _near(
                gm,
                down,
                "activation",
                f"{op_base(norm)} between activation and down projection mixes neurons",
            )
        return None
    if not sources or not _nonlinear(tree) or tree.foreign:
        if sources and _nonlinear(tree) and len(sources) <= 2:
            names = ", ".join(op_base(n) for n in tree.foreign[:3])
            if not any(op_base(n) in NOT_HIDDEN or n.op == "placeholder" for n in tree.foreign):
                return _near(gm, down, "activation", f"the hidden layer also depends on {names}")
        return None
    try:
        return _region(gm, down, tree, sources)
    except Missed as missed:
        return _near(gm, down, missed.role, missed.reason)


def _near(gm: fx.GraphModule, down: Linear, role: str, reason: str) -> NearMiss:
    path = str(down.weight.target).rpartition(".")[0]
    return NearMiss("FeedForward", path, role, reason, source_line(down.nodes[0].meta))


def _region(gm: fx.GraphModule, down: Linear, tree: _Tree, sources: list[Linear]) -> FeedForward:
    if len(sources) > 2:
        raise Missed("up", f"{len(sources)} projections feed the down projection (1 or 2 expected)")
    inputs = {source.x for source in sources}
    if len(inputs) > 1:
        raise Missed("gate", "gate and up projections read different inputs")
    if len(tree.leaves) > 2:
        raise Missed("up", f"the projection is cut into {len(tree.leaves)} parts (1 or 2 expected)")
    x = inputs.pop()
    if x is down.result:
        raise Missed("up", "the layer reads its own result")
    hidden = shape_of(down.x)[-1]
    scalars: dict[fx.Node, float] = {}
    for constant in tree.constants:
        value = attribute(gm, str(constant.target))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise Missed("activation", f"a learned tensor {constant.target} acts on the neurons")
        if isinstance(value, nn.Parameter):  # as a number it would never train again
            raise Missed("activation", f"the learned scalar {constant.target} is part of it")
        scalars[constant] = float(value.detach())
    weights: dict[fx.Node, LinearWeight] = {}
    for leaf, source in tree.leaves.items():
        rows = None
        if leaf is not source.result:
            try:
                rows = rows_by_last_dim(source.result, leaf)
            except NotFollowed as error:
                raise Missed(
                    "up", f"its part of the fused projection is unclear: {error}"
                ) from None
            if torch.equal(rows, torch.arange(shape_of(source.result)[-1])):
                rows = None
        weights[leaf] = source.tensors(gm, rows)
        if weights[leaf].weight.shape[0] != hidden:
            raise Missed(
                "down",
                f"the down projection reads {hidden} features, the up projection "
                f"makes {weights[leaf].weight.shape[0]}",
            )
    inside = {down.result, *down.nodes, *tree.nodes, *tree.moves}
    for source in sources:
        inside.update(source.nodes)
    for node in inside - {down.result}:
        outside = [user for user in node.users if user not in inside]
        if outside:
            raise Missed(
                "hidden", f"{node.name} is also used by {outside[0].name}, outside the layer"
            )
    up, gate = _roles(down.x, tree)
    stream = residual(down.result, x)
    activation = _program(down.x, tree, up, gate, scalars)
    order = sorted(inside, key=lambda n: int(n.meta["order"]))
    ports = {"x": x, "hidden": down.x, "y": down.result, "stream": stream}
    roles = [("up", tree.leaves[up]), ("down", down)]
    if gate is not None:
        roles.insert(0, ("gate", tree.leaves[gate]))
    parts = projections(gm, roles, ports)
    factor = _factor(down.x, tree, up)
    for part in parts:
        if part.ports["y"] is up and factor is not None:
            part.ports["gate"] = factor
    return FeedForward(
        path=common_path([weights[up].weight_name, down.tensors(gm).weight_name]),
        where=source_line(down.nodes[0].meta),
        up=weights[up],
        gate=weights[gate] if gate is not None else None,
        down=down.tensors(gm),
        activation=activation,
        activation_name=activation_name(activation),
        ports=ports,
        sites={"ffn": Site(down.result, tuple(order))},
        parts=parts,
    )


def _factor(hidden: fx.Node, tree: _Tree, up: fx.Node) -> fx.Node | None:
    """What ``up`` is multiplied with to give ``hidden``, where it is computed before ``up``."""
    if op_base(hidden) not in ("mul", "mul_") or len(hidden.all_input_nodes) != 2:
        return None
    one, two = hidden.all_input_nodes
    other = two if one is up else one
    before = other in tree.nodes and int(other.meta["order"]) < int(up.meta["order"])
    return other if up in (one, two) and before else None


def common_path(names: list[str]) -> str:
    """``a.b.up.weight``, ``a.b.down.weight`` -> ``a.b``."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _roles(hidden: fx.Node, tree: _Tree) -> tuple[fx.Node, fx.Node | None]:
    """(up, gate): gate is the one of two parts that passes the nonlinearity."""
    leaves = sorted(tree.leaves, key=lambda n: int(n.meta["order"]))
    if len(leaves) == 1:
        return leaves[0], None

    def bent(leaf: fx.Node) -> bool:
        frontier, bends = {leaf}, False
        for node in sorted(tree.nodes, key=lambda n: int(n.meta["order"])):
            if any(arg in frontier for arg in node.all_input_nodes):
                both = any(
                    arg not in frontier and (arg in tree.leaves or arg in tree.nodes)
                    for arg in node.all_input_nodes
                )
                if both:
                    break
                frontier.add(node)
                bends = bends or (op_base(node) not in LINEAR_OPS and not is_identity(node))
        return bends

    gates = [leaf for leaf in leaves if bent(leaf)]
    gate = gates[0] if gates else leaves[0]
    return next(leaf for leaf in leaves if leaf is not gate), gate


def residual(result: fx.Node, x: fx.Node) -> fx.Node:
    """The addition of ``result`` to a value that ``x`` came from; Missed where there is none."""
    upstream: set[fx.Node] = set()
    stack = [x]
    while stack:
        node = stack.pop()
        if node not in upstream:
            upstream.add(node)
            stack.extend(node.all_input_nodes)
    seen: set[fx.Node] = set()
    frontier = [result]
    for _ in range(RESIDUAL_REACH):
        step: list[fx.Node] = []
        for node in frontier:
            for user in node.users:
                if user in seen:
                    continue
                seen.add(user)
                if op_base(user) in ("add", "add_"):
                    others = [a for a in user.all_input_nodes if a not in seen and a is not node]
                    if any(o in upstream and o.op != "get_attr" for o in others):
                        return user
                if is_pointwise(user) or is_movement(user) or op_base(user) in NORMS | {"mean"}:
                    step.append(user)
        frontier = step
    after = ", ".join(op_base(u) for u in result.users) or "nothing"
    raise Missed(
        "residual", f"its result is not added back to the layer's input (it goes to {after})"
    )


def _program(
    hidden: fx.Node,
    tree: _Tree,
    up: fx.Node,
    gate: fx.Node | None,
    scalars: dict[fx.Node, float],
) -> Program:
    """The elementwise nodes as a program of (up,) or (up, gate)."""
    names: dict[fx.Node, Any] = {up: Ref("up")}
    if gate is not None:
        names[gate] = Ref("gate")
    names.update(scalars)
    steps = []
    for node in sorted(tree.nodes, key=lambda n: int(n.meta["order"])):
        if is_identity(node) or (is_cast(node) and _same_dtype(node)):
            names[node] = names[node.args[0]]  # type: ignore[index]
            continue

        def load(arg: fx.Node) -> Any:
            return names[arg] if arg in names else arg.meta["int"]

        args = fx.map_arg(node.args, load)
        kwargs = fx.map_arg(node.kwargs, load)
        names[node] = Ref(node.name)
        steps.append(Step(node.name, op_name(node.target), plain(args), dict(kwargs)))
    inputs = ("up", "gate") if gate is not None else ("up",)
    return Program(inputs, tuple(steps), names[hidden].name)


def _same_dtype(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.meta.get("dtype") == node.meta.get("dtype")


def plain(args: Any) -> tuple[Any, ...]:
    return tuple(
        list(a) if isinstance(a, fx.immutable_collections.immutable_list) else a for a in args
    )


_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu-tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    "gelu-quick": lambda v: v * torch.sigmoid(1.702 * v),
    "relu-squared": lambda v: torch.nn.functional.relu(v).square(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activation_name(program: Program) -> str:
    """The activation's usual name, found by its values, else ``custom``."""
    grid = torch.linspace(-6, 6, 193, dtype=torch.float64)
    gated = len(program.inputs) == 2
    try:
        values = program(torch.ones_like(grid), grid) if gated else program(grid)
    except (RuntimeError, TypeError):
        return "custom"
    for name, function in _KNOWN.items():
        if torch.allclose(values.double(), function(grid), rtol=1e-5, atol=1e-6):
            return name
    return "custom"
