"""Let calibration text flow through the sparse graph, and let every layer adjust to what it gets.

Routers are fitted on the dense model's activations, but layer n of the sparse model sees what the
sparse layers before it made of the text: thresholds read off dense scores let through too much or
too little, and what stands in for dead units was fitted to other inputs. Here one batch runs
through the graph at a few budgets; just before a routed module runs, its pass may adjust it, so
every layer is settled on the output of settled layers in a single run per budget (the order of
greedy layer-wise calibration, as in SparseGPT, arXiv:2301.00774). Where several passes route, each
is also settled alone, the others all live, for dials that are turned one at a time. With everything
live nothing changes: the dense limit stays as proven.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.calibrate import Progress, run_until
from sparsify.core import Pass
from sparsify.runtime.dial import routers, set_active

BUDGETS = (0.25, 0.5, 0.75)  # ascending; between them modules interpolate


def settle(
    gm: fx.GraphModule,
    made: Sequence[tuple[nn.Module, Pass[Any]]],
    inputs: Sequence[Tensor],
    smaller: Sequence[Tensor],
    *,
    progress: Progress | None = None,
) -> None:
    """Call ``Pass.settle`` for every module in ``made``, in graph order, at each of BUDGETS.

    Args:
        gm: the sparse graph; budgets are as before after it.
        made: spliced modules with the pass that made them.
        inputs: flat graph inputs, one batch of calibration text; ``smaller`` the same of fewer
            tokens, for passes alone.
        progress: called with ("settle", budgets done, budgets).
    """
    owners = {id(module): work for module, work in made}
    nodes = [
        node
        for node in gm.graph.nodes
        if node.op == "call_module" and id(gm.get_submodule(str(node.target))) in owners
    ]
    dials = [router for _, router in routers(gm)]
    if not nodes or not dials:
        return
    before = [router.setting for router in dials]
    names = list(dict.fromkeys(work.name for _, work in made))
    runs: list[str | None] = [None, *(names if len(names) > 1 else ())]
    try:
        for number, (alone, budget) in enumerate(itertools.product(runs, BUDGETS)):
            set_active(gm, budget if alone is None else 1.0, warn=False)
            if alone is not None:
                set_active(gm, budget, pass_name=alone, warn=False)
            with _hooked([(m, w) for m, w in made if alone in (None, w.name)], alone is not None):
                run_until(gm, smaller if alone else inputs, nodes[-1])
            if progress is not None:
                progress("settle", number + 1, len(runs) * len(BUDGETS))
    finally:
        for router, setting in zip(dials, before, strict=True):
            router.setting = setting


@contextlib.contextmanager
def _hooked(made: Sequence[tuple[nn.Module, Pass[Any]]], alone: bool) -> Iterator[None]:
    def settles(work: Pass[Any]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                work.settle(module, inputs, alone)

        return hook

    handles = [m.register_forward_pre_hook(settles(work)) for m, work in made]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
