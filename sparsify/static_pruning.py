"""The honest baseline: the same units dropped for every token, at the budget of a routed model.

Neurons, heads and input features are ranked by what they add to the output on calibration text, as
strong training-free structured pruning does: by energy ``E[h^2] * |w|^2``, or, where the mean of
what is dropped goes into a bias, by what that leaves, ``Var[h] * |w|^2`` (An et al., FLAP,
arXiv:2312.11983). Optionally the weights that stay are refitted by least squares to the dense
output (as in SparseGPT, arXiv:2301.00774), which changes weights, so there is no dense limit any
more. Budgets are one for all layers, or those that the routed model really spent per layer. Nothing
is copied and nothing stays changed: the pruned model exists inside a ``with`` block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.runtime.dial import kept
from sparsify.static_units import Moments, Ranking, Units, units_of

REFIT_BYTES = 2**31  # of second moments; layers too large for it are not refitted


def counts(fractions: Sequence[float], units: Sequence[int]) -> list[int]:
    """Whole units per layer; rounding is carried on, so that the total meets the budget."""
    found, carried = [], 0.0
    for fraction, size in zip(fractions, units, strict=True):
        wanted = fraction * size + carried
        whole = min(max(round(wanted), 1), size)
        carried = wanted - whole
        found.append(whole)
    return found


def prunable(model: nn.Module) -> dict[str, Units]:
    """Path -> the units of a routed module that a static mask can drop."""
    found = {path: units_of(module) for path, module in model.named_modules()}
    return {path: units for path, units in found.items() if units is not None}


@contextlib.contextmanager
def all_live(model: nn.Module) -> Iterator[None]:
    """The dense limit of a routed model; its budgets come back after."""
    with kept(model) as routers:
        for router in routers:
            router.set_active(1.0, warn=False)
        yield


def rank(
    model: nn.Module, run: Callable[[Tensor], Any], batches: Iterable[Tensor]
) -> dict[str, Ranking]:
    """Path -> ranking of a routed model's units, on its dense activations.

    Args:
        model: with routed modules.
        run: calls the model on token ids.
        batches: token ids (batch, token).
    """
    found = prunable(model)
    moments = {path: Moments() for path in found}
    if 4 * sum(units.pairs for units in found.values()) <= REFIT_BYTES:
        for path, units in found.items():
            if units.pairs:
                moments[path].cross = torch.zeros(units.count, units.count)
    with contextlib.ExitStack() as stack, torch.no_grad(), all_live(model):
        for path, units in found.items():
            stack.enter_context(units.watched(moments[path]))
        for ids in batches:
            run(ids)
    return {p: units.ranking(moments[p]) for p, units in found.items() if moments[p].count}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which units stay: path -> (live (N,) bool, bias (D,) or None).

    Attributes:
        rows: path -> refitted weight rows (N, D).
        weights: path -> what a module weighs in ``active``; all the same where it is missing.
    """

    layers: Mapping[str, tuple[Tensor, Tensor | None]]
    note: str
    rows: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def active(self) -> float:
        """Fraction of units that stay."""
        kept = {path: float(live.float().mean()) for path, (live, _) in self.layers.items()}
        return weighted(kept, self.weights)

    def applied(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """See :func:`pruned`."""
        return pruned(model, self)


def weighted(fractions: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The mean of what the modules at these paths say."""
    total = sum(weights.get(path, 1.0) for path in fractions)
    return sum(f * weights.get(path, 1.0) for path, f in fractions.items()) / total


def plan(
    rankings: Mapping[str, Ranking],
    active: Mapping[str, float],
    *,
    compensate: bool,
    note: str,
    refit: bool = False,
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """Keep the fraction ``active[path]`` of the units of every layer."""
    paths = [path for path in rankings if path in active]
    whole: dict[str, int] = {}
    for size in {rankings[p].units for p in paths}:  # neurons carry rounding to neurons
        same = [p for p in paths if rankings[p].units == size]
        whole |= dict(zip(same, counts([active[p] for p in same], [size] * len(same)), strict=True))
    chosen = {p: rankings[p].choose(whole[p], compensate=compensate) for p in paths}
    rows: dict[str, Tensor] = {}
    for path in paths:
        again = rankings[path].refit
        if refit and again is not None:
            live, _ = chosen[path]
            rows[path], bias = again(live)
            chosen[path] = (live, bias)
    return Plan(chosen, note, rows, weights or {})


@contextlib.contextmanager
def pruned(model: nn.Module, chosen: Plan) -> Iterator[None]:
    """Inside, the routed model is its dense model with the plan's units gone for every token."""
    found = prunable(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(all_live(model))
        for path, (live, bias) in chosen.layers.items():
            stack.enter_context(found[path].pruned(live, bias, chosen.rows.get(path)))
        yield
