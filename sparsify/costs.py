"""What a model costs per token: floating-point operations and bytes, from the graph itself.

Dense projections count two operations per weight and position, averaged over the example's tokens
(so what runs once per sequence, like a pooler, counts in proportion). Bytes are the weights read
when one token is decoded alone, and the keys and values it attends to. Routed modules report their
own cost at the budget their router is set to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from sparsify.linears import find_linears
from sparsify.probe import attribute, op_base, shape_of
from sparsify.regions import Attention, Region
from sparsify.report import ModelFacts
from sparsify.rewrite import node_count
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.cost import Cost
from sparsify.runtime.spec import RoutedModule

CONTEXT = 512  # keys a token attends to, where the caller does not say


def facts(gm: fx.GraphModule, regions: Sequence[Region], *, context: int = CONTEXT) -> ModelFacts:
    """Size and cost of a graph.

    Args:
        regions: the regions found in it; dense attention is counted by them.
        context: keys per token for the attention's cost.
    """
    unique = {id(p): p for p in gm.parameters()}
    parts: dict[str, Cost] = {}

    def add(kind: str, cost: Cost) -> None:
        parts[kind] = parts.get(kind, Cost()) + cost

    tokens = _tokens(regions)
    for linear in find_linears(gm).values():
        weight = attribute(gm, str(linear.weight.target))
        positions = math.prod(shape_of(linear.result)[:-1]) / tokens
        size = weight.numel() * weight.element_size()
        add("projections", Cost(2 * weight.numel() * min(positions, 1.0), size))
    for node in gm.graph.nodes:
        if node.op == "call_function" and op_base(node).startswith("conv"):
            weight = node.args[1]
            value = attribute(gm, str(weight.target)) if weight.op == "get_attr" else None
            if isinstance(value, Tensor):
                add("convolutions", Cost(2 * value.numel(), value.numel() * value.element_size()))
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, RoutedModule):
                active = _active(gm, node, getattr(module, "unit", None))
                add(type(module).__name__, module.cost(active, context))
    nodes = set(gm.graph.nodes)
    for region in regions:
        here = region.ports["y"] in nodes  # else it lies inside a routed layer, which counts it
        if isinstance(region, Attention) and here and _attends(region, nodes):
            add("attention scores", _dense_attention(region, context))
    total = sum(parts.values(), Cost())
    return ModelFacts(
        nodes=node_count(gm),
        parameters=sum(p.numel() for p in unique.values()),
        parameter_bytes=sum(p.numel() * p.element_size() for p in unique.values()),
        flops_per_token=total.flops,
        bytes_per_token=total.bytes + total.cache,
        by_kind={kind: cost.flops for kind, cost in parts.items()},
    )


def routed_cost(
    gm: fx.GraphModule,
    nodes: Iterable[fx.Node],
    *,
    context: int = CONTEXT,
    live: Mapping[RoutedModule, float] | None = None,
) -> Cost:
    """Cost of the routed modules among ``nodes``.

    Args:
        live: module -> share of its units that were really live; as its router is set where it is
            missing.
    """
    total = Cost()
    for node in nodes:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, RoutedModule):
            share = (live or {}).get(module)
            if share is None:
                share = _active(gm, node, getattr(module, "unit", None))
            total += module.cost(share, context)
    return total


def _tokens(regions: Sequence[Region]) -> int:
    """Tokens of the example: positions of the largest region input."""
    counts = [math.prod(shape_of(r.ports["y"])[:-1]) for r in regions]
    return max(counts, default=1)


def _active(gm: fx.GraphModule, node: fx.Node, unit: int | None) -> float | None:
    """The budget of the router that selects for this module, where it is another node."""
    for arg in node.all_input_nodes:
        if arg.op == "call_module":
            module = gm.get_submodule(str(arg.target))
            if isinstance(module, Budgeted):
                return module.live_share(unit)
    return None


def _attends(region: Attention, nodes: Collection[fx.Node]) -> bool:
    """Whether the graph scores keys densely here: passes may rewrite the projections only."""
    if region.rewritten_by is None:
        return True
    site = region.sites.get("attend")
    return site is not None and site.result in nodes and site.result.op != "call_module"


def _dense_attention(region: Attention, context: int) -> Cost:
    width = region.head_dim + region.value_dim
    size = torch.finfo(region.query.weight.dtype).bits // 8
    return Cost(
        flops=2.0 * context * region.heads * width,
        cache=float(context * region.kv_heads * width * size),
    )
