"""The graph as straight Python for inference on a CPU: tidied, and called without detours.

``GraphModule.forward`` reads ``self.model.layers.0.mlp...`` through ``nn.Module.__getattr__`` for
every weight and calls operations through ``torch.ops``, which converts arguments by schema. On a
small model that is a tenth of a decoding step. Here a tidied copy of the graph
(:mod:`sparsify.runtime.tidy`) is printed as a function over the module's own dictionaries, in which
operations have the names under which torch's parser calls them. It computes the same bits.

**One token.** For a single new token a causal mask shuts nothing out, and without padding or a
window the whole mask is open: attention without it gives the same bits. Whether it is open is
looked at in every step, by the part of the graph that makes the masks.

What changes the graph (a rewrite, a move) recompiles it, and the function is made anew. Weights and
modules are looked up in every call, so they can be replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sparsify.runtime.beside import Product, grouped, several
from sparsify.runtime.masks import drop_masks, fix_tokens, keep_masks, masks_of
from sparsify.runtime.straight_text import Function, function
from sparsify.runtime.tidy import mutates, tidy

Outputs = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How calls of one kind run.

    Attributes:
        run: the function.
        masks: gives all attention masks of a call; None where ``unmasked`` cannot be used.
        unmasked: the function without the masks.
        done: what was tidied, and how often.
    """

    run: Function
    masks: Function | None = None
    unmasked: Function | None = None
    done: dict[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, inputs: Sequence[Any]) -> Outputs:
        if self.masks is not None and self.unmasked is not None and all(
            map(_open, self.masks(*inputs))
        ):  # fmt: skip
            return self.unmasked(*inputs)
        return self.run(*inputs)


class Straight:
    """Keeps what was made of a graph for as long as the graph does not change."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, bool, int], tuple[str, Any, _Plan]] = {}

    def run(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        one: bool = False,
        product: Product | None = None,
    ) -> Outputs:
        """``module.forward(*inputs)``.

        Args:
            product: in place of ``linear(x, weight, bias)``.
            one: the first input holds one token of every sequence, and the second dimension of what
                the graph reads off it is that.
        """
        if not _plainly(inputs):
            outputs: Outputs = module.forward(*inputs)
            return outputs
        return self.plan(module, one, product)(inputs)

    def plan(
        self,
        module: fx.GraphModule,
        one: bool = False,
        product: Product | None = None,
    ) -> _Plan:
        """What calls of ``module`` run; made at the first."""
        key = (id(module), one, id(product))
        known = self._plans.get(key)  # its code is a new text object after every recompile
        if known is None or known[0] is not module.code or known[1] is not product:
            known = self._plans[key] = (module.code, product, _plan(module, one, product))
        return known[2]

    def __deepcopy__(self, memo: dict[int, object]) -> Straight:
        return Straight()

    def done(
        self,
        module: fx.GraphModule,
        one: bool = False,
        product: Product | None = None,
    ) -> dict[str, int]:
        """What was tidied in calls of that kind, and how often."""
        plan = self.plan(module, one, product)
        open_masks = {} if plan.masks is None else {"attention masks left out while open": 1}
        return {**plan.done, **open_masks}


def _plainly(inputs: Sequence[Any]) -> bool:
    """Real data on the CPU, for inference, and nobody who watches or casts operations."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) is int or (type(x) is Tensor and x.is_cpu) for x in inputs)
    )


def _open(mask: Tensor) -> bool:
    """The mask lets every query attend to every key: true everywhere, or adds zero."""
    return bool(mask.all()) if mask.dtype is torch.bool else not bool(mask.any())


# ---------------------------------------------------------------------------- making plans


def _plan(module: fx.GraphModule, one: bool, product: Product | None) -> _Plan:
    graph = _copied(module.graph)
    calls: dict[Any, Callable[..., Any]] = {}
    if product is not None:
        calls = {torch.ops.aten.linear.default: product, several: product.several}
    if one:
        fix_tokens(graph)
    masks = masks_of(graph) if one else []
    tokens = 1 if one else None
    if not masks:
        done = _tidied(graph, module, tokens, calls)
        return _Plan(function(graph, module, calls), done=done)
    only, opened = _copied(graph), _copied(graph)
    keep_masks(only)
    drop_masks(opened)
    done = _tidied(opened, module, tokens, calls)
    _tidied(graph, module, tokens, calls)
    run, makes, unmasked = (function(g, module, calls) for g in (graph, only, opened))
    return _Plan(run, makes, unmasked, done)


def _tidied(
    graph: fx.Graph, module: fx.GraphModule, tokens: int | None, calls: Mapping[Any, Any]
) -> dict[str, int]:
    done = tidy(graph, tokens)
    saved = 0 if mutates(graph) else grouped(graph, module, products=several in calls)
    return {**done, "projections of one input computed in one call": saved} if saved else done


def _copied(graph: fx.Graph) -> fx.Graph:
    twin = fx.Graph()
    twin.output(twin.graph_copy(graph, {}))
    return twin
