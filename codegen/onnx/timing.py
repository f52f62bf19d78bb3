"""How long the forms of one routed feed-forward layer take in ONNX Runtime, on this machine.

What is timed is as near to a model as one layer can be: every form is *one* session in which
several copies of the layer stand one after the other (:mod:`sparsify.codegen.onnx.chain`), each
with weights of its own, and the cache is cleared before a call: a layer of a model finds its
weights in memory, and its operators' code in the cache. (Of 64 MB in copies a good part of the live
experts is still in a cache of 32 MiB when its turn comes again: as MoE SmolLM2's layers took 0.58
of the dense layer's time so, 0.66 with twice as many copies, 0.73 cleared, in the model 0.7.)

In a session with several threads those that wait stay awake: they look for work for tens of
milliseconds, between calls too. Without that an operator that uses two threads has to wake one
first, which costs forms with many operators most (llama of 576/1536 layers, two threads: 5.1 ms a
token, 8.4 with threads that sleep). So it is on here as in a model's session. But a session's
threads that look for work take the cores from the next session: here they sleep as soon as a call
returns. A session has a turn, of several calls, before the next has one; the first calls of a turn
do not count (woken threads may share a core until the system moves one: calls took three times as
long, for 60 ms). The median of a turn's calls counts, and of turns the median again.

Held against whole models, decoded with all layers in a form and all dense (milliseconds saved a
layer: here, in the model; on two threads, on one): SmolLM2-135M as MoE, 22 of 64 experts live, 0.09
to 0.12 and 0.07 to 0.14, 0.25 and 0.26 to 0.33; a llama of such layers, 40 live, -0.04 and 0.02,
-0.02 and 0.06, in branches -0.75 and -0.55, -0.53 and -0.49; 2048/8192 in 64 experts, 41 live, as
MoE 0.4 and 0.7, 1.2 and 0.5, in branches 0.3 and 0.7, 1.7 and 3.2; in 8, half live, in branches
with int8 weights 0.6 and 0.9, 1.4 and 1.4, int4 0.5 and 0.5, 0.9 and 1.2. (How fast memory is
changes on a shared machine within minutes, and what is saved with it.)
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.codegen.onnx import parity, write
from sparsify.codegen.onnx.asked import Asked
from sparsify.codegen.onnx.chain import chained, input_names
from sparsify.runtime.ffn import RoutedFFN

TURNS = 7  # of every form
WARM, TURN = 0.08, 0.08  # seconds of a turn that do not count, and that do; a call at least of both
DRAWN = 4  # selections of a turn
BUFFER = 64 << 20  # bytes; the caches of the machines here hold 32 MiB
MOST = 8  # copies
BYTES = {"int8": 1.0, "int4": 0.5}  # of a weight while it waits; others are made float32 at load


@dataclasses.dataclass(frozen=True)
class Running:
    """A form, loaded.

    Attributes:
        session: of ONNX Runtime; copies: of the layer in it.
    """

    session: Any
    copies: int


def measured(
    ffn: RoutedFFN, ways: Sequence[str], lives: Sequence[int], asked: Asked
) -> list[dict[str, float]]:
    """Milliseconds of a call, by way.

    Args:
        ways: of :func:`sparsify.codegen.onnx.form_ffn.ways`; ``dense`` is with all experts live.
        lives: live experts of a token, shared ones included; for each of them there is a result.
        asked: tokens of a call, threads, and how weights are stored.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = sessions(ffn, ways, Path(folder), asked)
        return [times(running, ffn, live, asked.tokens) for live in lives]


def sessions(ffn: RoutedFFN, ways: Sequence[str], folder: Path, asked: Asked) -> dict[str, Running]:
    """The layer in each of its forms, from files under ``folder``."""
    size = sum(p.numel() for p in ffn.parameters()) * BYTES.get(asked.weights, 4.0)
    copies = min(-(-BUFFER // max(round(size), 1)), MOST)
    found = {}
    for way in ways:
        made = chained(ffn, way, copies, asked.opset, asked.weights)
        file, *_ = write.write(made, folder / f"{way}.onnx", external=None, force=False)
        del made
        session = parity.session(file, threads=asked.threads, in_turn=True)
        found[way] = Running(session, copies)
    return found


def times(
    running: Mapping[str, Running],
    ffn: RoutedFFN,
    live: int,
    tokens: int,
    turns: int | None = None,
) -> dict[str, float]:
    """Milliseconds of a call, the forms in turn."""
    generator = torch.Generator().manual_seed(0)
    spent: dict[str, list[float]] = {way: [] for way in running}
    copies = max(each.copies for each in running.values())
    for _ in range(turns or TURNS):
        flats = [_drawn(ffn, live, tokens, copies, generator) for _ in range(DRAWN)]
        for way, each in running.items():
            names = input_names(copies)
            spent[way].append(_turn(each, [parity.feed(each.session, names, f) for f in flats]))
    return {way: statistics.median(each) * 1e3 for way, each in spent.items()}


def _turn(running: Running, feeds: Sequence[dict[str, Any]]) -> float:
    """Median seconds of a copy in one turn."""
    _calls(running, feeds, WARM)
    return statistics.median(_calls(running, feeds, TURN)) / running.copies


def _calls(running: Running, feeds: Sequence[dict[str, Any]], seconds: float) -> list[float]:
    """Seconds of every call that fits into so many; one at least."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        _sweep()
        start = time.perf_counter()
        running.session.run(None, feeds[len(found) % len(feeds)])
        found.append(time.perf_counter() - start)
    return found


def _sweep() -> None:
    """Fill the cache with something else."""
    _SWEPT.setdefault("buffer", np.ones(BUFFER // 4, np.float32)).sum()


_SWEPT: dict[str, Any] = {}


def _drawn(
    ffn: RoutedFFN, live: int, tokens: int, copies: int, generator: torch.Generator
) -> list[Tensor]:
    """x, and a selection for every copy."""
    x = torch.randn(1, tokens, ffn.width, generator=generator)
    return [x, *(selection(ffn, live, tokens, generator) for _ in range(copies))]


def selection(ffn: RoutedFFN, live: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(1, tokens, N) ones and zeros, ``live`` ones a token, the shared experts' among them."""
    router = ffn.router
    order = torch.arange(ffn.experts) if router.order is None else router.order
    places = torch.rand(tokens, router.routed, generator=generator).argsort(-1)
    drawn = (places < live - router.shared).float()
    both = torch.cat([torch.ones(tokens, router.shared), drawn], -1)
    return torch.zeros_like(both).index_copy(-1, order, both).unsqueeze(0)
