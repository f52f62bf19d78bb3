"""From bytes to decoding speed: a curve that is timed on this machine.

The routed model, lowered to kernels where there are some, decodes one token at a few even budgets,
interleaved with the dense model (:mod:`sparsify.bench`). Decoding is bound by what is read, so its
time is taken to be a function of the bytes read, linear between the timed points: how a budget is
spread over layers hardly matters for time, and a target speed becomes a number of bytes. Timings
differ from run to run; everything else of a search is reproducible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from sparsify import bench_setup
from sparsify.bench import DENSE, EAGER, LOWERED, Bench
from sparsify.bench_table import Regime
from sparsify.costs import routed_cost
from sparsify.errors import BadInput
from sparsify.runtime.dial import kept, set_active
from sparsify.runtime.model import SparseModel
from sparsify.searching_target import Meter

BUDGETS = (1.0, 0.75, 0.5, 0.25)
ROUNDS = 5
CACHED = 128  # tokens before the decoded one
Progress = Callable[[str, int, int], None]


def timed(
    meter: Meter,
    sparse: SparseModel,
    dense: Any,
    *,
    context: int,
    seed: int,
    progress: Progress | None = None,
) -> Meter:
    """``meter`` with the curve of this machine.

    Raises:
        BadInput: no dense module to time, or a model that does not decode.
    """
    layers = getattr(sparse.call_spec, "layers", ())
    if not isinstance(dense, nn.Module) or not layers:
        raise BadInput(
            "speed is that of decoding beside the dense model, which this model does not do",
            help="--target flops=... or bytes=...",
        )
    work = Bench(sparse, {DENSE: dense.eval()}, bench_setup.ids_of(sparse, seed))
    rows = list(work.rows([Regime.of(1, CACHED)], BUDGETS, ROUNDS, progress))
    nodes = [n for n in sparse.graph.graph.nodes if n.op == "call_module"]
    points: list[tuple[float, float]] = []
    names = {row.model for row in rows}
    wanted = LOWERED if LOWERED in names else EAGER
    with kept(sparse):
        for row in rows:
            if row.model == wanted and row.active is not None:
                set_active(sparse.graph, row.active, warn=False)
                size = meter.cost(routed_cost(sparse.graph, nodes, context=context))
                points.append((size, row.speedup.median))
    points.sort(reverse=True)
    best = 0.0
    curve = []
    for size, speed in points:  # reading less is never slower, but for noise
        best = max(best, speed)
        curve.append((size, best))
    shown = ", ".join(f"{size / meter.dense:.2f}: {speed:.2f}" for size, speed in curve)
    note = (
        f"speed was timed here ({wanted}, one token after {CACHED}; share of bytes: speed = "
        f"{shown}) and differs from run to run"
    )
    return dataclasses.replace(meter, curve=tuple(curve), notes=(note,))
