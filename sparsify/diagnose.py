"""Bisect: which pass and which region first break a claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify.errors import ClaimFailed
from sparsify.evidence import check_end_to_end
from sparsify.findings import Bisection
from sparsify.pipeline import Stage, State, run_stage
from sparsify.regions import Region
from sparsify.report import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def bisect(
    fresh: Callable[[], State], stages: Sequence[Stage], pipeline: str, progress: Any = None
) -> Bisection:
    """Find the culprit.

    First every region is checked alone on dense activations; if all hold but the model as a whole
    does not, the number of regions rewritten (in execution order) is bisected.

    Args:
        fresh: makes a new, unrewritten State each time it is called.
        stages: the pipeline.
        pipeline: its text, for the result.
    """
    runs = 0
    for count in range(1, len(stages) + 1):
        state = fresh()
        for stage in stages[: count - 1]:
            run_stage(state, stage, verify="off", reproducer=None)
        runs += 1
        failed = _failing(state, stages[count - 1])
        if failed is None:
            continue
        if failed.scope == "region":
            return Bisection(pipeline, stages[count - 1].work.name, failed.region, failed, runs)
        regions = state.matches.of(stages[count - 1].work.region_type)
        low, high = 0, len(regions)  # rewriting the first `low` holds, the first `high` fails
        while high - low > 1:
            middle = (low + high) // 2
            runs += 1
            trial = fresh()
            for stage in stages[: count - 1]:
                run_stage(trial, stage, verify="off", reproducer=None)
            trial.only = _first(middle)
            run_stage(trial, stages[count - 1], verify="off", reproducer=None)
            found = check_end_to_end(trial.gm, trial.example, trial.golden, trial.claims)
            if progress is not None:
                progress("bisect", runs, runs + (high - low).bit_length())
            if found.ok:
                low = middle
            else:
                high, failed = middle, found
        return Bisection(
            pipeline, stages[count - 1].work.name, regions[high - 1].path, failed, runs
        )
    return Bisection(pipeline, None, None, None, runs)


def _first(count: int) -> Callable[[Region], bool]:
    return lambda region: region.index < count


def _failing(state: State, stage: Stage) -> Evidence | None:
    """The first failed check of a stage: regions first, in execution order."""
    try:
        run_stage(state, stage, verify="each", reproducer=None)
    except ClaimFailed as error:
        failed: Sequence[Evidence] = error.evidence
        return min(failed, key=lambda e: e.scope != "region")
    return None
