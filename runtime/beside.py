"""Projections of one input, computed in one call: queries, keys and values, or gate and up.

A kernel call of a decoded token costs 10 to 20 microseconds beside reading its weights: Python that
went cold while weights streamed through the caches, threads that start. Half of the calls of a
transformer read what another one reads. :func:`grouped` finds them in a graph that is about to run;
products of dense weights become one :func:`several`, routed modules of one class one
:func:`together`, which asks their kernels whether they can be run so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from sparsify.runtime.spec import RoutedModule

_LINEAR = torch.ops.aten.linear.default


class Product(Protocol):
    """A kernel for dense products."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``linear``."""

    def several(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """:func:`several`."""


def several(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """``linear`` of x with each weight; a graph that runs calls the product kernel instead."""
    pairs = zip(weights, biases, strict=True)
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in pairs]


def together(modules: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """What each of ``modules``, of one class, makes of ``x``; in one call where kernels can.

    For inference: autograd and autocast are not asked for (a graph that is printed never runs
    under them).
    """
    joint = getattr(modules[0].kernel, "together", None)
    if joint is not None:
        found: Sequence[Tensor] | None = joint(modules, x)
        if found is not None:
            return found
    return [module.forward(x) for module in modules]


def grouped(graph: fx.Graph, module: nn.Module, *, products: bool) -> int:
    """Put projections of one input together; how many calls that are saved.

    They move to the first of their group, which can change nothing: they read ``x`` and weights.

    Args:
        module: whose modules the graph calls.
        products: whether ``several`` will be a kernel.
    """
    groups: dict[tuple[fx.Node, Any], list[fx.Node]] = {}
    for node in graph.nodes:
        key = _key(node, module, products)
        if key is not None:
            groups.setdefault(key, []).append(node)
    saved = 0
    for (x, kind), nodes in groups.items():
        if len(nodes) > 1:
            _join(graph, x, nodes, dense=kind is _LINEAR)
            saved += len(nodes) - 1
    return saved


def _key(node: fx.Node, module: nn.Module, products: bool) -> tuple[fx.Node, Any] | None:
    """The input and the kind of a projection."""
    if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module" and len(node.args) == 1:
        kind = type(module.get_submodule(str(node.target)))
        return (node.args[0], kind) if issubclass(kind, RoutedModule) else None
    if products and node.op == "call_function" and node.target is _LINEAR:
        weights = node.args[1:]
        plain = all(w is None or (isinstance(w, fx.Node) and w.op == "get_attr") for w in weights)
        return (node.args[0], _LINEAR) if plain else None
    return None


def _join(graph: fx.Graph, x: fx.Node, nodes: list[fx.Node], *, dense: bool) -> None:
    with graph.inserting_before(nodes[0]):
        if dense:
            pairs = [(*node.args[1:], None)[:2] for node in nodes]
            copies = [tuple(_read(graph, weight) for weight in pair) for pair in pairs]
            weights, biases = zip(*copies, strict=True)
            joint = graph.call_function(several, (x, list(weights), list(biases)))
        else:
            joint = graph.call_function(together, ([str(node.target) for node in nodes], x))
        for at, node in enumerate(nodes):
            item = graph.call_function(operator.getitem, (joint, at))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item)
            graph.erase_node(node)


def _read(graph: fx.Graph, weight: Any) -> fx.Node | None:
    """A weight again, here: where it was read may be further down."""
    return None if weight is None else graph.get_attr(str(weight.target))
