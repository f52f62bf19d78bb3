"""The other honest baseline: drop the small inputs of every matrix, at as many operations.

TEAL (arXiv:2408.14690) as its paper's uniform variant has it: one threshold of input magnitude per
matrix, read off calibration text so that the same fraction of inputs is live in every matrix; no
router, no training, dead inputs are zero. A feed-forward layer is cut at its input and at its
hidden neurons, so it saves in all three matrices; a projection is cut at its input. What is
rewritten is exactly what the routed model rewrites. The fraction is then moved until the operations
counted on the first tokens of the measured text are those of the routed model.

Nothing is copied and nothing stays changed: the model exists inside a ``with`` block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.counted import dense_operations, parts
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.inputs import RoutedLinear
from sparsify.static_pruning import all_live
from sparsify.static_units import DenseFFN, running

linear = nn.functional.linear

BINS = 4096  # of the magnitude, by its logarithm: 0.8 % apart
_OCTAVES = 24  # of them below one, and above
Cut = Callable[[str, Tensor], Tensor]  # (site, values (..., n)) -> values
CLOSE = 0.002  # counted operations that are close enough
TRIES = 4


def sites(model: nn.Module, pass_name: str | None = None) -> dict[str, float] | None:
    """Site -> operations of one live input of it; None where some routed module has no such cut.

    A site is the path of a routed module, with ``.x`` for its input or ``.h`` for the neurons.
    """
    found: dict[str, float] = {}
    for path, module in parts(model, pass_name):
        operations = dense_operations(module)
        if operations is None:
            return None
        if isinstance(module, RoutedFFN):
            each = 2.0 * module.up.numel()
            found[f"{path}.x"] = each * (1 + (module.gate is not None)) / module.width
            found[f"{path}.h"] = each / (module.experts * module.hidden)
        elif operations and not isinstance(module, Budgeted):
            found[f"{path}.x"] = operations / _inputs(module)
    return found or None


def _inputs(module: nn.Module) -> int:
    if isinstance(module, RoutedLinear):
        return int(module.columns.shape[0])
    assert isinstance(module, RoutedRows | RoutedColumns)
    units, width, last = module.blocks.shape
    return int(last if isinstance(module, RoutedRows) else units * width)


@contextlib.contextmanager
def cutting(model: nn.Module, cut: Cut, pass_name: str | None = None) -> Iterator[None]:
    """Inside, the routed model is its dense model with every site's values through ``cut``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(all_live(model))
        for path, module in parts(model, pass_name):
            forward = _forward(path, module, cut)
            if forward is not None:
                stack.enter_context(running(module, forward))
        yield


def _forward(path: str, module: nn.Module, cut: Cut) -> Callable[..., Tensor] | None:
    if isinstance(module, RoutedFFN):
        ffn = DenseFFN.of_routed(module)
        return lambda _, x: ffn.output(cut(f"{path}.h", ffn.hidden(cut(f"{path}.x", x))))
    if isinstance(module, RoutedLinear):
        weight, bias = module.columns.t(), module.bias
        return lambda _, x, *gates: linear(cut(f"{path}.x", x), weight, bias)
    if isinstance(module, RoutedRows | RoutedColumns):
        usual = module.forward
        return lambda _, x, select: usual(cut(f"{path}.x", x), select)
    return None


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """How large the inputs of every site are on calibration text: site -> counts (BINS,)."""

    counts: Mapping[str, Tensor]

    def thresholds(self, keep: float) -> dict[str, float]:
        """Site -> magnitude that the fraction ``keep`` of its inputs reaches; 0 keeps all."""
        if keep >= 1:
            return dict.fromkeys(self.counts, 0.0)
        found = {}
        for site, counts in self.counts.items():
            below = counts.cumsum(0)
            wanted = (1 - keep) * float(below[-1])
            at = int((below < wanted).sum())
            before = float(below[at - 1]) if at else 0.0
            inside = (wanted - before) / max(float(counts[at]), 1.0)
            found[site] = 2.0 ** ((at + inside) * 2 * _OCTAVES / BINS - _OCTAVES)
        return found


def magnitudes(
    model: nn.Module,
    run: Callable[[Any], Any],
    batches: Iterable[Any],
    pass_name: str | None = None,
) -> Magnitudes:
    """Count the magnitudes of every site's inputs, dense, in bounded memory."""
    counts: dict[str, Tensor] = {}

    def count(site: str, values: Tensor) -> Tensor:
        octave = values.detach().float().abs().clamp_min(2.0**-_OCTAVES).log2()
        place = ((octave + _OCTAVES) * (BINS / (2 * _OCTAVES))).long().clamp(0, BINS - 1)
        found = torch.bincount(place.flatten(), minlength=BINS).cpu()
        counts[site] = counts[site] + found if site in counts else found
        return values

    with torch.no_grad(), cutting(model, count, pass_name):
        for batch in batches:
            run(batch)
    return Magnitudes(counts)


@dataclasses.dataclass
class Teal:
    """The model at one fraction of live inputs; counts what it does.

    Attributes:
        thresholds: site -> smallest live magnitude.
        each: site -> operations of a live input.
    """

    model: nn.Module
    run: Callable[[Any], Any]
    thresholds: Mapping[str, float]
    each: Mapping[str, float]
    pass_name: str | None = None
    done: float = 0.0
    dense: float = 0.0

    def __call__(self, batch: Any) -> Any:
        """The output on one batch."""
        with cutting(self.model, self._cut, self.pass_name):
            return self.run(batch)

    def _cut(self, site: str, values: Tensor) -> Tensor:
        live = values.abs() >= self.thresholds[site]
        self.done += self.each[site] * int(live.sum())
        self.dense += self.each[site] * live.numel()
        return values * live

    @property
    def flops(self) -> float:
        """Operations over those of the dense matrices."""
        return self.done / self.dense if self.dense else math.nan


def fitted(
    model: nn.Module,
    run: Callable[[Any], Any],
    seen: Magnitudes,
    wanted: float,
    probe: Callable[[Callable[[Any], Any]], None],
    pass_name: str | None = None,
) -> tuple[Teal, float]:
    """TEAL whose counted operations on a probe are the share ``wanted``, and its fraction.

    Args:
        seen: of calibration text; wanted: operations over the dense ones; probe: runs a model on
            some of what it will be measured on.
    """
    each = sites(model, pass_name)
    assert each is not None
    low, high, keep = 0.0, 1.0, min(max(wanted, 0.01), 1.0)
    best: tuple[float, float] = (math.inf, keep)
    for _ in range(TRIES):
        tried = Teal(model, run, seen.thresholds(keep), each, pass_name)
        with torch.no_grad():
            probe(tried)
        error = tried.flops - wanted
        best = min(best, (abs(error), keep))
        if abs(error) <= CLOSE:
            break
        low, high = (keep, high) if error < 0 else (low, keep)
        moved = keep * wanted / max(tried.flops, 1e-6)
        keep = moved if low < moved < high else (low + high) / 2
    return Teal(model, run, seen.thresholds(best[1]), each, pass_name), best[1]
