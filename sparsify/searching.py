"""Find the budgets that cost least quality: ``sparsify search MODEL --target flops=0.6``.

One conversion of the model gives routers with dials; what is searched is where they stand. Every
unit (:mod:`sparsify.searching_units`) is measured alone at a few levels, all else dense: the KL
divergence from the dense model at the model's end, on calibration text that no router was fitted
on. Between the measured levels the loss follows the routers' error tables. The levels with the
least sum of losses at a cost are a multiple-choice knapsack (:mod:`sparsify.knapsack`).

Sums of single losses are a first order only. So every solution is measured as a whole, costs are
corrected by the units that were really live, and in further rounds each unit is taken out of the
solution alone (all live, the others sparse): what that gains scales its losses, and the knapsack is
solved again. The best of all that was measured is the result, with one even budget and the
dial's own allocation among the candidates: a search never loses to them on its text.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify import api
from sparsify.capture.causal import is_causal_lm
from sparsify.corpus import token_blocks
from sparsify.costs import CONTEXT, routed_cost
from sparsify.errors import BadInput
from sparsify.knapsack import Choice, Front
from sparsify.models import load_model
from sparsify.pipeline import Placed, State
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.dial import set_active, set_each
from sparsify.runtime.model import SparseModel
from sparsify.searching_goal import Target, target_of
from sparsify.searching_measure import Measure, Measured, sample
from sparsify.searching_result import Candidate, Row, Search
from sparsify.searching_speed import timed
from sparsify.searching_target import Meter
from sparsify.searching_text import pipeline_text
from sparsify.searching_units import Setting, Unit, units_of, written

PASSES = "hidden-route"
LEVELS = (0.5, 0.25)  # that each unit is measured at
TOKENS = 512
ROUNDS = 1
POINTS = 6  # of the front
CLOSE = 1e-3  # a cost that is over the target by this share of the dense cost meets it
Progress = Callable[[str, int, int], None]


def search(
    model: Any,
    target: str | Target,
    *,
    passes: str = PASSES,
    max_kl: float | None = None,
    calibration: str | Path | Sequence[str] | Iterable[Tensor] | None = "docstrings",
    tokens: int = TOKENS,
    levels: Sequence[float] = LEVELS,
    rounds: int = ROUNDS,
    points: int = POINTS,
    example: Any = None,
    tokenizer: Any = None,
    dtype: Any = None,
    context: int = CONTEXT,
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Allocate a budget over layers and passes by measured sensitivity.

    Args:
        model: a dense causal language model, as for :func:`sparsify.compile`.
        target: ``flops=0.6``, ``bytes=0.6`` (shares of the dense model's, per token), or
            ``speed=1.5`` (times the dense model's decoding speed).
        passes: a pipeline text; its ``active`` options are what is searched.
        max_kl: refuse a setting further from the dense model than this, nats a token.
        calibration: text that routers are fitted on and settings are measured on.
        tokens: to measure on.
        levels: budgets that each unit is measured at.
        rounds: of measuring again around the solution.
        points: of the Pareto front.
        example, tokenizer, dtype, seed: as for :func:`sparsify.compile`.
        context: keys per token that the attention cost counts.
        progress: called with (what, done, total) during long work.

    Raises:
        BadInput: an unknown or unreachable target, no calibration text, no language model, or
            more than ``max_kl``. And as :func:`sparsify.compile`.
    """
    wanted = target_of(target) if isinstance(target, str) else target
    _check(calibration, tokens, levels, rounds, points, max_kl)
    assert calibration is not None
    text: Any = calibration if isinstance(calibration, str | Path) else list(calibration)
    clock = _Clock()
    placed: list[Placed] = []

    def watch(_: Any, state: State) -> None:
        placed[:] = state.placed

    loaded = load_model(model, example=example, tokenizer=tokenizer)
    dense: Any = loaded.model
    if not is_causal_lm(dense, loaded.example):
        raise BadInput(
            "search needs a causal language model",
            why="settings are compared by the divergence of next-token probabilities",
        )
    clock.tick("load")
    sparse = api.compile(
        dense, passes, loaded.example, text, tokenizer=loaded.tokenizer,
        verify="end", dtype=dtype, seed=seed, context=context, progress=progress, on_step=watch,
    )  # fmt: skip
    clock.tick("compile")
    name, batches = token_blocks(
        text, loaded.tokenizer, length=api.BLOCK,
        limit=api.CALIBRATION_TOKENS + max(tokens, api.BLOCK), seed=seed,
    )  # fmt: skip
    given = not isinstance(text, str | Path) and isinstance(text[0], Tensor)
    fitted = sum(b.numel() for b in batches) if given else api.CALIBRATION_TOKENS
    if not any(each.routers for each in placed):
        raise BadInput(
            f"nothing in '{passes}' has a budget to search", help="for example: hidden-route"
        )
    meter = Meter.of(sparse, wanted.kind, context=context)
    vocabulary = int(getattr(sparse.call_spec, "vocabulary", 1))
    ids, note = sample(batches, fitted, tokens, vocabulary)
    units = units_of(sparse.graph, placed, context=context)
    if wanted.kind == "speed":
        meter = timed(meter, sparse, dense, context=context, seed=seed, progress=progress)
    work = _Work(sparse, passes, placed, units, ids, meter, context, progress)
    clock.tick("prepare")
    found = work.search(wanted, levels, rounds, points, clock, max_kl)
    return dataclasses.replace(
        found, model=loaded.name, text=name, seed=seed, calibration=name,
        notes=(*found.notes, *([note] if note else []), *meter.notes), machine=api.machine(),
    )  # fmt: skip


def _check(
    calibration: Any,
    tokens: int,
    levels: Sequence[float],
    rounds: int,
    points: int,
    max_kl: float | None,
) -> None:
    if calibration is None:
        raise BadInput(
            "search needs calibration text",
            why="budgets go where the output changes least, which is measured on text",
            help="calibration='docstrings', a file, texts, or batches of token ids",
        )
    if tokens < 2 or rounds < 0 or points < 0:
        raise BadInput(f"tokens={tokens}, rounds={rounds}, points={points}: out of range")
    if not levels or not all(0 < level < 1 for level in levels):
        raise BadInput(f"levels={list(levels)} are no budgets", help="between 0 and 1, e.g. 0.5")
    if max_kl is not None and not max_kl > 0:
        raise BadInput(f"max_kl={max_kl} is no divergence", help="above 0, in nats a token")


class _Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.at = time.perf_counter()

    def tick(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.at
        self.at = now


@dataclasses.dataclass
class _Tried:
    """A setting and what was measured of it."""

    name: str
    setting: dict[Budgeted, float]
    measured: Measured
    reached: float  # cost of what was really live, in the meter's units
    nominal: float  # by the budgets
    predicted: float | None = None


class _Work:
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
        # what a unit loses at a measured level -> by unit, by level
        self.alone: list[dict[int, float]] = [{} for _ in units]
        self.scale = [1.0] * len(units)

    # -- costs

    def cost(self, setting: Setting) -> float:
        """What a setting costs by its budgets, in the meter's units."""
        set_each(self.sparse.graph, setting)
        nodes = self.measure.nodes
        return self.meter.cost(routed_cost(self.sparse.graph, nodes, context=self.context))

    # -- measuring

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
            self._tick("sensitivity", done + 1, len(jobs))
        self.runs += len(jobs)

    def again(self, tried: _Tried, chosen: Sequence[int], number: int) -> None:
        """Take every unit out of a solution alone; what that gains scales its losses."""
        base = self.measure.record(tried.setting)
        gains: dict[int, float] = {}
        for at, unit in enumerate(self.units):
            if chosen[at]:
                gains[at] = base.kl - self.measure.changed(unit, unit.setting(0)).kl
            self._tick(f"round {number}", at + 1, len(self.units))
        self.runs += 1 + len(gains)
        for at, gain in gains.items():
            lost = self.loss(at, chosen[at]) / self.scale[at]
            floor = 0.1 * lost  # a unit that seems to cost nothing may cost a little
            self.scale[at] = max(gain, floor) / lost if lost > 0 else 1.0
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
    def _log_scale(levels: Sequence[Any], known: dict[int, float], level: int) -> float:
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

    # -- solving

    def front(self) -> Front:
        """All solutions by the losses known so far."""
        groups = []
        for number, unit in enumerate(self.units):
            worst, choices = 0.0, []
            for level in range(len(unit.levels)):
                worst = max(worst, self.loss(number, level))  # less is never better
                saved = self.meter.part(unit.levels[0].cost) - self.meter.part(
                    unit.levels[level].cost
                )
                choices.append(Choice(-saved, worst))
            groups.append(choices)
        return Front(groups)

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
    ) -> _Tried | None:
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
            tried = _Tried(name, setting, found, reached, self.cost(setting))
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
        clock: _Clock,
        max_kl: float | None,
    ) -> Search:
        budget = self.meter.budget(target)
        self._reachable(target, budget)
        self.sensitivities(levels)
        clock.tick("sensitivity")
        tried: list[_Tried] = []
        for name, family in (("even", self.even), ("dial", self.dialled)):
            found = self.fit(name, family, budget)
            tried += [found] if found is not None else []
        front = self.front()
        before: tuple[int, ...] = ()
        for number in range(rounds + 1):
            name = "search" if number == 0 else f"search, round {number}"
            found, chosen = self._solution(name, front, budget)
            if found is None:
                break
            if chosen == before:  # what was learnt changed nothing
                break
            tried.append(found)
            before = chosen
            if number < rounds:
                self.again(found, chosen, number + 1)
                front = self.front()
        clock.tick("solve")
        if not tried:
            raise self._unreachable(target)
        best = min(tried, key=lambda t: t.measured.kl)
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
            measurements=self.runs, calibration="", seed=0, notes=(), seconds=clock.seconds,
        )  # fmt: skip

    def _solution(
        self, name: str, front: Front, budget: float
    ) -> tuple[_Tried | None, tuple[int, ...]]:
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

    def _candidate(self, tried: _Tried) -> Candidate:
        found, dense = tried.measured, self.measure.dense
        return Candidate(
            tried.name, self.meter.said(tried.reached),
            self.meter.said(tried.nominal), found.kl, found.error,
            math.exp(found.nll - dense.nll), tried.predicted,
            pipeline_text(self.passes, self.placed, tried.setting),
        )  # fmt: skip

    def _row(self, number: int, best: _Tried) -> Row:
        unit = self.units[number]
        set_each(self.sparse.graph, best.setting)
        now = routed_cost(self.sparse.graph, unit.nodes, context=self.context)
        saved = self.meter.part(unit.levels[0].cost) - self.meter.part(now)
        kl = {f"{unit.levels[at].active:g}": kl for at, kl in self.alone[number].items()}
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
        self, max_kl: float | None, best: _Tried, target: Target, front: Sequence[Candidate]
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
