"""One contest: the dense model, the routed one at its budgets, then the baselines they call for.

What is measured is the caller's: next tokens of a text, answers to questions, embeddings. The
routed models run first, counting; the baselines are then made for what was counted. Of several ways
to prune, the best on a few items of what is measured goes on, which favours the baseline.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

from sparsify import contenders
from sparsify.contenders import BASELINES, Contender, Run
from sparsify.runtime.dial import kept

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]


# (reference, others, items, progress) -> name -> result, the reference's under "dense"
Measure = Callable[
    [Run, Mapping[str, Run], Sequence[Any], Callable[[int], None] | None], dict[str, Result]
]


@dataclasses.dataclass(frozen=True)
class Contest(Generic[Result]):
    """Who took part, by budget, and what came out; ``dense`` is a key of the results too."""

    shown: tuple[Contender, ...]
    results: dict[str, Result]

    def at(self, active: float) -> list[Contender]:
        """Those at a budget, the routed model first."""
        return [c for c in self.shown if c.active == active]


def hold(
    model: nn.Module,
    call: Run,
    items: Sequence[Any],
    measure: Measure[Result],
    loss: Callable[[Result], Any],
    *,
    active: Sequence[float],
    calibration: Sequence[Any] = (),
    pass_name: str | None = None,
    baselines: Sequence[str] = BASELINES,
    few: Sequence[Any] = (),
    total: int = 0,
    progress: Progress | None = None,
) -> Contest[Result]:
    """Measure all of them.

    Args:
        model: with routed modules; its budgets are as before after it.
        call: a batch -> the model's output.
        items: what is measured on, as ``measure`` takes it.
        measure: results of models on items; loss: of a result, lower is better.
        active: budgets; calibration: batches that baselines are fitted on; none, no baselines.
        pass_name: turn and count only what this pass made; the rest is all live.
        baselines: ``static``, ``teal`` or both.
        few: of the items, on which ways to prune are compared and TEAL's operations are matched;
            the batches themselves where ``call`` takes items.
        total: items, for the progress; progress: called with ("evaluate", items done, items).
    """
    asked = [b for b in baselines if calibration and any(a < 1 for a in active)]

    def report(offset: int) -> Callable[[int], None] | None:
        if progress is None:
            return None
        return lambda done: progress("evaluate", offset + done, (1 + bool(asked)) * total)

    with kept(model), evaluating(model):
        reference = contenders.dense_run(model, call)
        found = [contenders.routed(model, call, a, pass_name) for a in active]
        shown = [r.contender for r in found]
        results = measure(reference, {c.name: c.run for c in shown}, items, report(0))
        if asked:
            others: list[Contender] = []
            if "static" in asked:
                ways = contenders.static(model, call, found, calibration)
                tried = measure(reference, {c.name: c.run for c in ways}, few, None) if ways else {}
                for a in dict.fromkeys(c.active for c in ways):
                    same = [c for c in ways if c.active == a]
                    others.append(min(same, key=lambda c: loss(tried[c.name])))
            if "teal" in asked:
                others += contenders.teal_at(
                    model, call, found, calibration, lambda run: _run(measure, run, few), pass_name
                )
            if others:
                more = measure(reference, {c.name: c.run for c in others}, items, report(total))
                results |= {c.name: more[c.name] for c in others}
                shown += others
    return Contest(tuple(shown), results)


def _run(measure: Measure[Any], run: Run, few: Sequence[Any]) -> None:
    measure(run, {}, few, None)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
