"""Which level every group gets: the multiple-choice knapsack, by dynamic programming.

Of each group one choice is taken; the sum of costs must not exceed a budget, the sum of losses
should be least. Costs are counted in whole steps, rounded up, so a budget is never exceeded; one
table gives the answer for every budget, which is the Pareto front. Where all costs are whole
multiples of a step the answer is optimal, else it is at least as good as the optimum for a budget
smaller by one step per group, and what rounding left over is spent greedily.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FINE = 512  # steps per group: rounding costs a group less than 1/512 of its mean range
_MOST = 1 << 17  # steps in all


@dataclasses.dataclass(frozen=True)
class Choice:
    """One level of a group: what it costs, and what is lost by it."""

    cost: float
    loss: float


class Front:
    """The least loss at every budget.

    Args:
        groups: of each group its choices, at least one.
        steps: of the whole range between the cheapest and the dearest of all choices.
    """

    def __init__(self, groups: Sequence[Sequence[Choice]], *, steps: int | None = None) -> None:
        self.groups = [list(group) for group in groups]
        self.kept = [_useful(group) for group in self.groups]
        self.least = sum(g[k[0]].cost for g, k in zip(self.groups, self.kept, strict=True))
        self.most = sum(g[k[-1]].cost for g, k in zip(self.groups, self.kept, strict=True))
        self.steps = steps or min(FINE * max(len(self.groups), 1), _MOST)
        self.step = (self.most - self.least) / self.steps or 1.0
        self.taken: list[NDArray[np.uint16]] = []
        best = np.zeros(self.steps + 1)
        for group, kept in zip(self.groups, self.kept, strict=True):
            best = self._add(best, group, kept)

    def _add(
        self, best: NDArray[np.float64], group: Sequence[Choice], kept: Sequence[int]
    ) -> NDArray[np.float64]:
        """The table with one more group; entry c: the least loss within c steps."""
        found = np.full_like(best, np.inf)
        taken = np.zeros(len(best), dtype=np.uint16)
        for at in kept:
            weight = self._weight(group, kept, at)
            if weight > self.steps:
                continue
            loss = best[: len(best) - weight] + group[at].loss
            better = loss < found[weight:]
            found[weight:][better] = loss[better]
            taken[weight:][better] = at
        self.taken.append(taken)
        return found

    def _weight(self, group: Sequence[Choice], kept: Sequence[int], at: int) -> int:
        return math.ceil((group[at].cost - group[kept[0]].cost) / self.step - 1e-6)

    def best(self, budget: float) -> tuple[int, ...] | None:
        """The choice of each group; None where even the cheapest ones cost more."""
        spare = budget - self.least
        if spare < -1e-9 * max(abs(budget), 1.0):
            return None
        at = min(max(math.floor(spare / self.step + 1e-6), 0), self.steps)
        found: list[int] = []
        for taken, group, kept in zip(
            reversed(self.taken), reversed(self.groups), reversed(self.kept), strict=True
        ):
            choice = int(taken[at])
            at -= self._weight(group, kept, choice)
            found.append(choice)
        return self._fill(found[::-1], budget)

    def _fill(self, chosen: list[int], budget: float) -> tuple[int, ...]:
        """Spend what rounding left: the upgrade that saves most per cost, while one fits."""
        left = budget - sum(g[c].cost for g, c in zip(self.groups, chosen, strict=True))
        while True:
            fitting = []
            for number, (group, kept) in enumerate(zip(self.groups, self.kept, strict=True)):
                now = group[chosen[number]]
                for at in kept:
                    more, saved = group[at].cost - now.cost, now.loss - group[at].loss
                    if 0 < more <= left and saved > 0:
                        fitting.append((saved / more, -number, at))
            if not fitting:
                return tuple(chosen)
            _, number, at = max(fitting)
            left -= self.groups[-number][at].cost - self.groups[-number][chosen[-number]].cost
            chosen[-number] = at


def _useful(group: Sequence[Choice]) -> list[int]:
    """Choices by rising cost, without those that another one beats in both."""
    order = sorted(range(len(group)), key=lambda i: (group[i].cost, group[i].loss))
    kept: list[int] = []
    for at in order:
        if not kept or group[at].loss < group[kept[-1]].loss:
            kept.append(at)
    return kept
