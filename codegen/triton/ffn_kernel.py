"""The kernel of a :class:`~sparsify.runtime.ffn.RoutedFFN` on a GPU.

``module.kernel = lower_ffn(module)`` puts it in place. It declines (eager runs) where everything is
live, which is a dense product, where neurons of live experts are routed too, and where tensors are
not where Triton can read them. The router is one kernel where its rule has one
(:mod:`sparsify.codegen.triton.router`), else it runs as it is. Nothing waits for the device, except
that rules which cut make the counter wait for the number of live pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.elementwise import CannotLower
from sparsify.codegen.triton.activation import functions, key_of
from sparsify.codegen.triton.ffn_ops import routed_ffn
from sparsify.codegen.triton.host import FLOATS, interpreted
from sparsify.codegen.triton.router import can_route, selection
from sparsify.core import Refused
from sparsify.runtime.ffn import RoutedFFN


@dataclasses.dataclass(frozen=True)
class FFNKernel:
    """Runs a routed feed-forward layer through ``sparsify::routed_ffn``.

    Attributes:
        activation: the key of its activation's code.
    """

    activation: str

    def __call__(self, module: Any, *inputs: Tensor) -> Tensor | None:
        """What ``module.forward(x)`` gives and counts, or None."""
        (x,) = inputs
        router, inside = module.router, module.inside
        runs = x.device.type == "cuda" or (interpreted() and x.device.type == "cpu")
        runs = runs and not (interpreted() and x.dtype == torch.bfloat16)
        same = x.dtype == module.up.dtype and x.device == module.up.device
        thin = inside is not None and not inside.all_live
        if not runs or not same or x.dtype not in FLOATS or thin or router.all_live:
            return None
        estimated = module.slopes is not None
        scores = router.scores(x) if estimated else None
        if scores is not None:
            select = router(x, scores)
        else:
            select = selection(router, x) if can_route(router) else router(x)
        select = select.reshape(-1, module.experts)
        rows = x.reshape(-1, module.width)
        mask = select != 0
        cuts = router.selector.mean
        keep = module.experts if cuts else router.shared + int(router.budget)
        if cuts or not router.unit_weights:
            live = int(mask.sum())  # a weight may be zero
        else:
            live = len(rows) * keep
        module.counter.seen(len(rows), module.experts, live)
        module.counter.rows += live
        parts = (module.up, module.gate, module.down)
        biases = (module.up_bias, module.gate_bias, module.down_bias)
        y: Tensor = routed_ffn(rows, select, *parts, *biases, self.activation, keep)
        if live < len(rows) * module.experts:
            flat = None if scores is None else scores.reshape(len(rows), -1)
            y = module.stood_in(y, mask, flat)
        return y.to(x.dtype).view(x.shape)


def lower_ffn(module: RoutedFFN) -> FFNKernel:
    """The kernel of ``module``; Refused with the reason where there is none."""
    if type(module) is not RoutedFFN:
        raise Refused(f"no Triton kernel for a {type(module).__name__}: it runs eagerly")
    key = key_of(module.activation)
    try:
        functions(key)
    except CannotLower as error:
        raise Refused(f"its activation cannot be compiled: {error}") from error
    return FFNKernel(key)
