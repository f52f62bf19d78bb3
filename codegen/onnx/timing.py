"""How long the forms of one routed feed-forward layer take in ONNX Runtime, on this machine.

Every form becomes a small file of its own, with its router, loaded as often as its weights fit into
a buffer larger than the cache: run one after the other, these sessions find their weights in memory
and their code in the cache, as layers of a model do. (Clearing the cache between two runs of one
session instead charges a form for its operators: 576/1536 in 64 experts, one token, 0.82 ms as MoE
and 0.80 dense so; in a model of such layers MoE saved 0.25 ms a layer.) The forms take turns, and
the median counts. Random inputs would not select as text does, so the selection is given: the
router computes its own, which costs what it costs, and a second input says which experts are live:
so many as a token uses at the layer's budget, drawn anew for every run and token.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.codegen.onnx import parity, translate, write
from sparsify.codegen.onnx.forms import into_forms
from sparsify.codegen.onnx.trace import silenced
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.calling import ModuleCall, Slot
from sparsify.runtime.conditioned import ConditionedFFN
from sparsify.runtime.ffn import RoutedFFN

NAMES, OPSET = ("x", "given"), 20  # no operator of a layer changes with the opset
RUNS, WARM = 11, 2  # of every form
BUFFER = 64 << 20  # bytes; the caches of the machines here hold 32 MiB
MOST = 8  # sessions of a form: a layer for which they are too few is small enough to stay cached


def measured(
    ffn: RoutedFFN, ways: Sequence[str], lives: Sequence[int], tokens: int, threads: int
) -> list[dict[str, float]]:
    """Milliseconds of a call, by way.

    Args:
        ways: of :func:`sparsify.codegen.onnx.form_ffn.ways`; ``dense`` is with all experts live.
        lives: live experts of a token, shared ones included; for each of them there is a result.
        tokens: of a call.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = sessions(ffn, ways, Path(folder), threads)
        return [times(running, ffn, live, tokens) for live in lives]


def sessions(
    ffn: RoutedFFN, ways: Sequence[str], folder: Path, threads: int
) -> dict[str, list[Any]]:
    """The layer in each of its forms, in files under ``folder``, each loaded several times."""
    size = sum(p.nbytes for p in ffn.parameters())
    copies = min(-(-BUFFER // size), MOST)
    files = {way: _file(ffn, way, folder / way) for way in ways}
    return {
        way: [parity.session(file, threads=threads, spin=False) for _ in range(copies)]
        for way, file in files.items()
    }


def times(
    running: dict[str, list[Any]],
    ffn: RoutedFFN,
    live: int,
    tokens: int,
    runs: int | None = None,
) -> dict[str, float]:
    """Median milliseconds of a call, the forms in turn."""
    generator = torch.Generator().manual_seed(0)
    spent: dict[str, list[float]] = {way: [] for way in running}
    for _ in range(WARM + (runs or RUNS)):
        x = torch.randn(1, tokens, ffn.width, generator=generator)
        flat = (x, selection(ffn, live, tokens, generator))
        for way, copies in running.items():
            feed = parity.feed(copies[0], NAMES, flat)
            start = time.perf_counter()
            for session in copies:
                session.run(None, feed)
            spent[way].append((time.perf_counter() - start) / len(copies))
    return {way: statistics.median(each[WARM:]) * 1e3 for way, each in spent.items()}


class Timed(nn.Module):
    """x (1, T, D), given (1, T, N) -> (1, T, D): the layer's form with the selection ``given``."""

    def __init__(self, ffn: RoutedFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        ffn: Any = self.ffn
        if ffn.way == "dense":
            dense: Tensor = ffn._every(x)
            return dense
        select, scores = given, None
        if not isinstance(ffn, ConditionedFFN):  # one row per sample: nothing, per token
            estimated = ffn.slopes is not None
            scores = ffn.router.scores(x) if estimated else None
            own = ffn.router(x) if scores is None else ffn.router(x, scores)
            select = torch.where(own > 1e30, own, given)  # never, but nobody can know
        routed: Tensor = ffn.routed(x, select, scores)
        return routed


def alone(ffn: RoutedFFN, way: str) -> Timed:
    """A copy of the layer, its weights shared, in its form."""
    shared: dict[int, Any] = {id(t): t for t in (*ffn.parameters(), *ffn.buffers())}
    timed = Timed(copy.deepcopy(ffn, shared)).eval()
    if way == "dense":
        for part in dials(timed.ffn):
            part.set_active(1.0, warn=False)
    into_forms(timed, way)
    return timed


def dials(ffn: RoutedFFN) -> list[Budgeted]:
    """What is turned to one where the layer is to be dense."""
    return [ffn.router] if ffn.inside is None else [ffn.router, ffn.inside]


def _file(ffn: RoutedFFN, way: str, folder: Path) -> Path:
    timed, tokens = alone(ffn, way), torch.export.Dim.AUTO
    example = (torch.zeros(1, 3, ffn.width), torch.ones(1, 3, ffn.experts))
    free = ({1: tokens}, {1: tokens})
    with torch.no_grad(), silenced():
        program = torch.export.export(timed, example, dynamic_shapes=free, strict=False)
    slots = tuple(Slot(n, (1, None, e.shape[2])) for n, e in zip(NAMES, example, strict=True))
    call = ModuleCall(slots, NAMES, {}, {"kind": "tensor"})
    made = translate.translated(program, call, OPSET, "ort-custom")
    folder.mkdir()
    return write.write(made, folder / "layer.onnx", external=None, force=False)[0]


def selection(ffn: RoutedFFN, live: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(1, tokens, N) ones and zeros, ``live`` ones a token, the shared experts' among them."""
    router = ffn.router
    order = torch.arange(ffn.experts) if router.order is None else router.order
    places = torch.rand(tokens, router.routed, generator=generator).argsort(-1)
    drawn = (places < live - router.shared).float()
    both = torch.cat([torch.ones(tokens, router.shared), drawn], -1)
    return torch.zeros_like(both).index_copy(-1, order, both).unsqueeze(0)
