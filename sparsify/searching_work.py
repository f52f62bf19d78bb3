"""One search: settings that really cost the target are measured, and the best one is kept.

Candidates are families with one number for a dial: one even budget, the dial's own allocation, and
the knapsack's solutions. Each is turned until the units that are really live cost the target.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from sparsify.costs import routed_cost
from sparsify.errors import BadInput
from sparsify.knapsack import Front
from sparsify.pipeline import Placed
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.dial import set_active, set_each
from sparsify.runtime.model import SparseModel
from sparsify.searching_goal import Target
from sparsify.searching_losses import Losses
from sparsify.searching_measure import Measure, Measured
from sparsify.searching_result import Candidate, Row, Search
from sparsify.searching_target import Meter
from sparsify.searching_text import pipeline_text
from sparsify.searching_units import Setting, Unit, written

CLOSE = 1e-3  # a cost that is over the target by this share of the dense cost meets it
Progress = Callable[[str, int, int], None]


class Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.at = time.perf_counter()

    def tick(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.at
        self.at = now


@dataclasses.dataclass
class Tried:
    """A setting and what was measured of it."""

    name: str
    setting: dict[Budgeted, float]
    measured: Measured
    reached: float  # cost of what was really live, in the meter's units
    nominal: float  # by the budgets
    predicted: float | None = None


class Work:
    """One search: what is measured, what is solved, what was tried."""

    def __init__(
        self,
        sparse: SparseModel,
        passes: str,
        placed: Sequence[Placed],
        units: Sequence[Unit],
        ids: Sequence[Tensor],
        meter: Meter,
        context: int,
        progress: Progress | None,
    ) -> None:
        self.sparse, self.passes, self.placed, self.units = sparse, passes, placed, list(units)
        self.meter, self.context, self.progress = meter, context, progress
        self.measure = Measure(sparse, units, ids, context=context)
        self.routers = self.measure.routers
        self.runs = 1
        self.losses = Losses(self.units, self.measure, self._tick)

    # -- costs

    def cost(self, setting: Setting) -> float:
        """What a setting costs by its budgets, in the meter's units."""
        set_each(self.sparse.graph, setting)
        nodes = self.measure.nodes
        return self.meter.cost(routed_cost(self.sparse.graph, nodes, context=self.context))

    # -- solving

    def solved(self, chosen: Sequence[int]) -> dict[Budgeted, float]:
        """The setting of a solution."""
        found: dict[Budgeted, float] = {}
        for unit, level in zip(self.units, chosen, strict=True):
            found |= unit.setting(level)
        return found

    def even(self, budget: float) -> dict[Budgeted, float]:
        """One budget for every router that costs ``budget``, or the lowest."""
        return self._bisected(lambda a: dict.fromkeys(self.routers, a), budget)

    def dialled(self, budget: float) -> dict[Budgeted, float]:
        """As ``set_active`` spreads a budget."""

        def setting(active: float) -> dict[Budgeted, float]:
            set_active(self.sparse.graph, active, warn=False)
            return {r: written(r) for r in self.routers}

        return self._bisected(setting, budget)

    def _bisected(
        self, family: Callable[[float], dict[Budgeted, float]], budget: float
    ) -> dict[Budgeted, float]:
        low, high = 0.01, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cost(family(middle)) > budget else (middle, high)
        return family(round(low, 3))

    def fit(
        self,
        name: str,
        family: Callable[[float], dict[Budgeted, float] | None],
        budget: float,
        tries: int = 4,
    ) -> Tried | None:
        """A family's member that really costs ``budget``: its nominal budget is corrected.

        Returns None where the family has none that is cheap enough.
        """
        asked, best = budget, None
        for _ in range(tries):
            setting = family(asked)
            if setting is None:
                break
            found = self.measure.full(setting)
            self.runs += 1
            reached = self.meter.cost(found.cost)
            tried = Tried(name, setting, found, reached, self.cost(setting))
            if self.meets(reached, budget):
                if best is None or found.kl < best.measured.kl:
                    best = tried
                if budget - reached < CLOSE * self.meter.dense:
                    break
            asked -= reached - budget
        return best

    def meets(self, reached: float, budget: float) -> bool:
        """Whether a cost is within the budget, to the third place."""
        return reached <= budget + CLOSE * self.meter.dense

    # -- the whole

    def search(
        self,
        target: Target,
        levels: Sequence[float],
        rounds: int,
        points: int,
        clock: Clock,
        max_kl: float | None,
    ) -> Search:
        budget = self.meter.budget(target)
        self._reachable(target, budget)
        self.losses.sensitivities(levels)
        clock.tick("sensitivity")
        tried: list[Tried] = []
        for name, family in (("even", self.even), ("dial", self.dialled)):
            found = self.fit(name, family, budget)
            tried += [found] if found is not None else []
        front = self.losses.front(self.meter)
        before: tuple[int, ...] = ()
        fronts: dict[str, Front] = {}
        for number in range(rounds + 1):
            name = "search" if number == 0 else f"search, round {number}"
            found, chosen = self._solution(name, front, budget)
            if found is None:
                break
            if chosen == before:  # what was learnt changed nothing
                break
            tried.append(found)
            before = chosen
            fronts[name] = front
            if number < rounds:
                self.losses.again(found.setting, chosen, number + 1)
                front = self.losses.front(self.meter)
        clock.tick("solve")
        if not tried:
            raise self._unreachable(target)
        best = min(tried, key=lambda t: t.measured.kl)
        solved = [t for t in tried if t.name in fronts]
        if solved:  # the losses that led to the best solution
            front = fronts[min(solved, key=lambda t: t.measured.kl).name]
        shown, evenly = self._points(front, points)
        clock.tick("front")
        self._within(max_kl, best, target, shown)
        set_each(self.sparse.graph, best.setting)
        candidates = {t.name: self._candidate(t) for t in tried}
        return Search(
            model="", passes=self.passes, target=target, text="",
            tokens=self.measure.dense.tokens, found=candidates[best.name],
            tried=tuple(candidates.values()), front=tuple(shown), even=tuple(evenly),
            units=tuple(self._row(n, best) for n in range(len(self.units))),
            measurements=self.runs + self.losses.runs, calibration="", seed=0, notes=(),
            seconds=clock.seconds, sparse=self.sparse,
            settings={t.name: t.setting for t in tried},
        )  # fmt: skip

    def _solution(
        self, name: str, front: Front, budget: float
    ) -> tuple[Tried | None, tuple[int, ...]]:
        """The knapsack's solution that really costs the budget, and its levels."""
        seen: list[tuple[dict[Budgeted, float], tuple[int, ...], float]] = []

        def family(asked: float) -> dict[Budgeted, float] | None:
            chosen = front.best(asked - self.meter.live)
            if chosen is None:
                return None
            setting = self.solved(chosen)
            loss = sum(front.groups[n][c].loss for n, c in enumerate(chosen))
            seen.append((setting, chosen, loss))
            return setting

        found = self.fit(name, family, budget)
        if found is None:
            return None, ()
        for setting, chosen, loss in seen:
            if setting is found.setting:
                found.predicted = loss
                return found, chosen
        raise AssertionError("a solution that was not solved for")

    def _points(self, front: Front, points: int) -> tuple[list[Candidate], list[Candidate]]:
        """Solutions for other budgets, and one even budget at the same cost."""
        shown, evenly = [], []
        least = front.least + self.meter.live
        for number in range(points):
            share = (number + 1) / (points + 1)
            budget = self.meter.dense + (least - self.meter.dense) * share
            one, _ = self._solution("", front, budget)
            other = self.fit("", self.even, budget, tries=2)
            self._tick("front", number + 1, points)
            if one is not None and other is not None:
                shown.append(self._candidate(one))
                evenly.append(self._candidate(other))
        return shown, evenly

    def _candidate(self, tried: Tried) -> Candidate:
        found, dense = tried.measured, self.measure.dense
        return Candidate(
            tried.name, self.meter.said(tried.reached),
            self.meter.said(tried.nominal), found.kl, found.error,
            math.exp(found.nll - dense.nll), tried.predicted,
            pipeline_text(self.passes, self.placed, tried.setting),
        )  # fmt: skip

    def _row(self, number: int, best: Tried) -> Row:
        unit = self.units[number]
        set_each(self.sparse.graph, best.setting)
        now = routed_cost(self.sparse.graph, unit.nodes, context=self.context)
        saved = self.meter.part(unit.levels[0].cost) - self.meter.part(now)
        kl = {f"{unit.levels[at].active:g}": kl for at, kl in self.losses.alone[number].items()}
        active = tuple(best.setting[r] for r in unit.routers)
        return Row(unit.pass_name, unit.regions, active, saved / self.meter.dense, kl)

    # -- refusals

    def least(self) -> float:
        """The least that any setting costs by its budgets."""
        lowest = [len(unit.levels) - 1 for unit in self.units]
        return self.cost(self.solved(lowest))

    def _reachable(self, target: Target, budget: float) -> None:
        if self.least() > budget + CLOSE * self.meter.dense:
            raise self._unreachable(target)

    def _unreachable(self, target: Target) -> BadInput:
        least = self.meter.said(self.least())
        return BadInput(
            f"{self.passes} cannot reach {target}",
            why=f"with every router at its lowest searched budget it is {target.kind}={least:.3g}",
            help="more passes (--passes), or another target",
        )

    def _within(
        self, max_kl: float | None, best: Tried, target: Target, front: Sequence[Candidate]
    ) -> None:
        if max_kl is None or best.measured.kl <= max_kl:
            return
        fine = [c for c in front if c.kl <= max_kl]
        help = f"of the front, {target.kind}={fine[-1].reached:.3g} keeps it" if fine else None  # noqa: A001
        raise BadInput(
            f"no setting that was found for {target} stays within KL {max_kl:g}",
            why=f"the best one is {best.measured.kl:.3g} nats a token from the dense model",
            help=help or "a milder target, or more passes",
        )

    def _tick(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)
