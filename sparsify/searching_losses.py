"""What every unit loses at every level: measured alone, then corrected around a solution.

Between the levels that were measured, the loss has the shape of the routers' error tables, scaled
so that it meets what was measured (the logarithm of the scale is linear in the budget).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparsify.knapsack import Choice, Front
from sparsify.searching_measure import Measure
from sparsify.searching_target import Meter
from sparsify.searching_units import Level, Setting, Unit

Tick = Callable[[str, int, int], None]


class Losses:
    """The losses of all units.

    Attributes:
        alone: of each unit, level -> KL measured with all else dense.
        scale: of each unit, on its losses: one, or what a solution told.
        runs: measurements so far.
    """

    def __init__(self, units: Sequence[Unit], measure: Measure, tick: Tick) -> None:
        self.units, self.measure, self.tick = list(units), measure, tick
        self.alone: list[dict[int, float]] = [{} for _ in units]
        self.scale = [1.0] * len(self.units)
        self.runs = 0

    def sensitivities(self, levels: Sequence[float]) -> None:
        """Every unit alone at every level."""
        jobs = [
            (number, level)
            for number, unit in enumerate(self.units)
            for level in sorted({unit.nearest(active) for active in levels})
        ]
        for done, (number, level) in enumerate(jobs):
            unit = self.units[number]
            found = self.measure.changed(unit, unit.setting(level))
            self.alone[number][level] = max(found.kl, 1e-9)
            self.tick("sensitivity", done + 1, len(jobs))
        self.runs += len(jobs)

    def again(self, setting: Setting, chosen: Sequence[int], number: int) -> None:
        """Take every unit out of a solution alone; what that gains scales its losses."""
        base = self.measure.record(setting)
        gains: dict[int, float] = {}
        for at, unit in enumerate(self.units):
            if chosen[at]:
                gains[at] = base.kl - self.measure.changed(unit, unit.setting(0)).kl
            self.tick(f"round {number}", at + 1, len(self.units))
        self.runs += 1 + len(gains)
        for at, gain in gains.items():
            lost = self.loss(at, chosen[at]) / self.scale[at]
            floor = 0.1 * lost  # a unit that seems to cost nothing may cost a little
            # half way: taken as it is, what one unit gains among others overcorrects
            told = max(gain, floor) / lost if lost > 0 else 1.0
            self.scale[at] = math.sqrt(self.scale[at] * told)
        mean = math.exp(sum(math.log(self.scale[at]) for at in gains) / max(len(gains), 1))
        for at in range(len(self.units)):
            if at not in gains:  # all live in this solution: as the others on average
                self.scale[at] = mean

    def loss(self, number: int, level: int) -> float:
        """What a unit loses at a level: its error table's shape, scaled to what was measured."""
        levels, known = self.units[number].levels, self.alone[number]
        if level == 0:
            return 0.0
        return (
            levels[level].shape
            * math.exp(self._log_scale(levels, known, level))
            * self.scale[number]
        )

    @staticmethod
    def _log_scale(levels: Sequence[Level], known: dict[int, float], level: int) -> float:
        """Log of measured loss over shape, linear in the budget between measured levels."""
        points = [
            (levels[at].active, math.log(kl / max(levels[at].shape, 1e-30)))
            for at, kl in sorted(known.items())
        ]
        active = levels[level].active
        above = [p for p in points if p[0] >= active] or points[:1]
        below = [p for p in points if p[0] <= active] or points[-1:]
        (a, one), (b, two) = above[-1], below[0]
        return one if a == b else one + (two - one) * (active - a) / (b - a)

    def front(self, meter: Meter) -> Front:
        """All solutions by the losses known so far."""
        groups = []
        for number, unit in enumerate(self.units):
            worst, choices = 0.0, []
            for level in range(len(unit.levels)):
                worst = max(worst, self.loss(number, level))  # less is never better
                saved = meter.part(unit.levels[0].cost) - meter.part(unit.levels[level].cost)
                choices.append(Choice(-saved, worst))
            groups.append(choices)
        return Front(groups)
