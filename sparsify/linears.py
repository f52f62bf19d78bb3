"""Every spelling of a dense projection, as one thing: ``y = x W^T + b``.

``linear``, ``addmm`` between views (Conv1D), ``matmul``/``mm`` with a parameter and an added bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from sparsify.probe import attribute, op_base, shape_of, source_line
from sparsify.regions import LinearWeight, Projection, Site


@dataclasses.dataclass(frozen=True)
class Linear:
    """One projection in the graph.

    Attributes:
        result: the node that holds y, shape (..., out).
        x: the node that holds the input, shape (..., in).
        weight, bias: ``get_attr`` nodes.
        transposed: the parameter is stored (in, out).
        nodes: the nodes that compute it, result included.
    """

    result: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    nodes: tuple[fx.Node, ...]

    def tensors(self, gm: fx.GraphModule, rows: Tensor | None = None) -> LinearWeight:
        """Its weights, restricted to ``rows`` of the output where given."""
        weight = attribute(gm, str(self.weight.target))
        bias = attribute(gm, str(self.bias.target)) if self.bias is not None else None
        return LinearWeight(
            _role(weight, rows, self.transposed),
            _role(bias, rows, False) if bias is not None else None,
            str(self.weight.target),
            str(self.bias.target) if self.bias is not None else None,
            self.transposed,
            rows,
        )


def projections(
    gm: fx.GraphModule, roles: Iterable[tuple[str, Linear]], ports: Mapping[str, fx.Node]
) -> list[Projection]:
    """The projections of a region as regions of their own; roles of a fused one are joined.

    Args:
        roles: (role, projection).
        ports: of the larger region: ``y`` and maybe ``stream``.
    """
    named: dict[fx.Node, tuple[Linear, list[str]]] = {}
    for role, linear in roles:
        names = named.setdefault(linear.result, (linear, []))[1]
        if role not in names:
            names.append(role)
    outer = {"result": ports["y"]} | {n: ports[n] for n in ("stream",) if n in ports}
    whole = {linear.result: linear.tensors(gm) for linear, _ in named.values()}
    return [
        Projection(
            path=str(linear.weight.target).removesuffix("weight").rstrip("._"),
            where=source_line(linear.nodes[0].meta),
            linear=whole[linear.result],
            role="+".join(names),
            ports={"x": linear.x, "y": linear.result, **outer},
            sites={"projection": Site(linear.result, linear.nodes)},
            beside=tuple(whole[o.result] for o, _ in named.values() if o.x is linear.x),
        )
        for linear, names in named.values()
    ]


def _role(parameter: Tensor, rows: Tensor | None, transposed: bool) -> Tensor:
    """The parameter as (out, in), restricted to rows; a leaf that says whether it trains."""
    value = parameter.detach()
    value = value.t() if transposed else value
    value = value[rows] if rows is not None else value
    return value.requires_grad_(parameter.requires_grad)


def _parameter(gm: fx.GraphModule, node: object) -> tuple[fx.Node, bool] | None:
    """``node`` as (get_attr node, transposed), looking through transposes and copies."""
    flipped = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            value = attribute(gm, str(node.target))
            is_matrix = isinstance(value, nn.Parameter | Tensor) and value.dim() == 2
            return (node, flipped) if is_matrix and value.is_floating_point() else None
        base = op_base(node)
        if base in ("t", "numpy_T", "mT", "transpose", "permute", "swapaxes"):
            if base == "permute" and [int(a) % 2 for a in node.args[1]] != [1, 0]:  # type: ignore[union-attr,arg-type]
                return None
            flipped = not flipped
        elif base not in ("detach", "alias", "contiguous", "clone"):
            return None
        node = node.args[0]
    return None


def _bias(gm: fx.GraphModule, node: object) -> fx.Node | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = attribute(gm, str(node.target))
        return node if isinstance(value, Tensor) and value.dim() == 1 else None
    return None


def _unflatten(node: fx.Node, features: int) -> tuple[fx.Node, list[fx.Node]]:
    """The tensor before ``view(-1, features)``, and the views passed."""
    passed = []
    while op_base(node) in ("view", "reshape", "_unsafe_view") and isinstance(
        node.args[0], fx.Node
    ):
        before = node.args[0]
        if not shape_of(before) or shape_of(before)[-1] != features:
            break
        passed.append(node)
        node = before
    return node, passed


def find_linears(gm: fx.GraphModule) -> dict[fx.Node, Linear]:
    """All projections by their result node. Needs ``probe.annotate`` to have run."""
    found: dict[fx.Node, Linear] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        base = op_base(node)
        if base == "linear":
            parameter = _parameter(gm, node.args[1])
            raw = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            bias = _bias(gm, raw)
            if parameter is None or (raw is not None and bias is None):
                continue
            weight, flipped = parameter
            found[node] = Linear(node, node.args[0], weight, bias, flipped, (node,))
        elif base in ("addmm", "mm", "matmul"):
            linear = _matmul(gm, node, base)
            if linear is not None:
                found[linear.result] = linear
    return found


def _matmul(gm: fx.GraphModule, node: fx.Node, base: str) -> Linear | None:
    """``addmm(b, x, W)``, ``mm(x, W)`` or ``matmul(x, W) + b`` as a Linear."""
    x, raw_weight = node.args[-2], node.args[-1]
    parameter = _parameter(gm, raw_weight)
    if parameter is None or not isinstance(x, fx.Node) or node.kwargs:
        return None
    weight, flipped = parameter
    bias = _bias(gm, node.args[0]) if base == "addmm" else None
    if base == "addmm" and bias is None:
        return None
    features = shape_of(x)[-1]
    nodes = [node]
    result = node
    source, views = _unflatten(x, features)
    if views and len(result.users) == 1:
        after = next(iter(result.users))
        if op_base(after) in ("view", "reshape", "_unsafe_view"):
            same = shape_of(after)[:-1] == shape_of(source)[:-1]
            if same and shape_of(after)[-1] == shape_of(result)[-1]:
                result, x = after, source
                nodes = [*reversed(views), node, after]
    if bias is None and len(result.users) == 1:
        after = next(iter(result.users))
        if op_base(after) in ("add", "add_") and len(after.args) == 2 and not after.kwargs:
            other = after.args[1] if after.args[0] is result else after.args[0]
            bias = _bias(gm, other)
            if bias is not None:
                result = after
                nodes.append(after)
    # a parameter used as it stands in x @ W is stored (in, out)
    return Linear(result, x, weight, bias, not flipped, tuple(nodes))
