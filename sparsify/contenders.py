"""Who is compared: the dense model, the routed one at several budgets, and the baselines.

The dense model is the routed one with everything live. A baseline stands at a budget of the routed
model, at what that really ran: static pruning at the same live share, TEAL at as many operations.
All are views of one model; nothing is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsify import teal
from sparsify.counted import Tally, dense_operations
from sparsify.report import Who
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.dial import set_active
from sparsify.static_layers import LayerPlan, layer_plans, layers_of, rank_layers
from sparsify.static_pruning import Plan, all_live, plan, prunable, rank, weighted

Run = Callable[[Any], Any]  # a batch -> the model's output
BASELINES = ("static", "teal")
PROBE = 2048  # tokens on which the ways to prune are compared, and TEAL's operations are matched


@dataclasses.dataclass(frozen=True)
class Contender:
    """One model at one budget.

    Attributes:
        who: as in the report; active: the budget.
        run: a batch -> the output.
        note: how it was made.
        realised: the live share that it really ran, so far; flops: its share of operations.
    """

    who: Who
    active: float
    run: Run
    note: str = ""
    realised: Callable[[], float | None] = lambda: None
    flops: Callable[[], float | None] = lambda: None

    @property
    def name(self) -> str:
        """Its own among those that are compared."""
        return f"{self.who} {self.active:g} {self.note}"


def dense(model: nn.Module, call: Run) -> Contender:
    """The routed model with everything live."""
    return Contender("dense", 1.0, dense_run(model, call))


def dense_run(model: nn.Module, call: Run) -> Run:
    """The routed model with everything live."""

    def run(batch: Any) -> Any:
        with all_live(model):
            return call(batch)

    return run


def pruned_run(model: nn.Module, call: Run, chosen: Plan | LayerPlan) -> Run:
    """The routed model's dense model without what the plan drops."""

    def run(batch: Any) -> Any:
        with chosen.applied(model):
            return call(batch)

    return run


@dataclasses.dataclass
class Routed:
    """The routed model at one budget, with a tally of what it ran."""

    contender: Contender
    tally: Tally


def routed(model: nn.Module, call: Run, active: float, pass_name: str | None = None) -> Routed:
    """The model at a budget, counting.

    Args:
        pass_name: turn and count only what this pass made; the rest is all live.
    """
    tally = Tally(model, pass_name)
    weights = weights_of(model)
    inner = at_budget(model, call, active, pass_name)

    def run(batch: Any) -> Any:
        tally.reset()
        output = inner(batch)
        tally.add()
        return output

    def realised() -> float | None:
        return weighted(tally.shares, weights) if tally.shares else None

    return Routed(
        Contender("routed", active, run, realised=realised, flops=lambda: tally.flops), tally
    )


def at_budget(model: nn.Module, call: Run, active: float, pass_name: str | None = None) -> Run:
    """The model at a budget; routers are set only when they stand elsewhere."""
    routers = [m for m in model.modules() if isinstance(m, Budgeted) and not m.led]
    state: list[tuple[float, int | None, float]] = []

    def run(batch: Any) -> Any:
        if not routers:
            return call(batch)
        if not state:
            if pass_name is not None:
                set_active(model, 1.0)
            set_active(model, active, pass_name=pass_name)
            state.extend(r.setting for r in routers)
        for router, setting in zip(routers, state, strict=True):
            if router.setting != setting:
                router.setting = setting
        return call(batch)

    return run


# ---------------------------------------------------------------------------- baselines


def static(
    model: nn.Module, call: Run, found: Sequence[Routed], calibration: Sequence[Any]
) -> list[Contender]:
    """The ways to prune that are tried at each budget below one; several for each."""
    live = {r.contender.active: r.tally.shares for r in found if r.contender.active < 1}
    return [
        Contender(
            "static pruning", active, pruned_run(model, call, way), way.note,
            realised=lambda way=way: way.active, flops=lambda way=way: _flops(model, way),  # type: ignore[misc]
        )
        for active, way in _plans(model, call, calibration, live)
    ]  # fmt: skip


def teal_at(
    model: nn.Module,
    call: Run,
    found: Sequence[Routed],
    calibration: Sequence[Any],
    probe: Callable[[Run], None],
    pass_name: str | None = None,
) -> list[Contender]:
    """TEAL at the operations of every budget below one; none where they are not known."""
    wanted = [(r.contender.active, r.tally.flops) for r in found if r.contender.active < 1]
    if teal.sites(model, pass_name) is None or not wanted or None in [f for _, f in wanted]:
        return []
    seen = teal.magnitudes(model, call, calibration, pass_name)
    made = []
    for active, flops in wanted:
        assert flops is not None
        run, keep = teal.fitted(model, call, seen, flops, probe, pass_name)
        note = f"{keep:.1%} of the inputs of every matrix"
        made.append(Contender(
            "TEAL", active, run, note,
            realised=lambda run=run: run.flops, flops=lambda run=run: run.flops,  # type: ignore[misc]
        ))  # fmt: skip
    return made


def _flops(model: nn.Module, way: Plan | LayerPlan) -> float | None:
    """Operations of a pruned model over the dense ones, of what the plan prunes."""
    if isinstance(way, LayerPlan):
        return None
    done = total = 0.0
    for path, (live, _) in way.layers.items():
        whole = dense_operations(model.get_submodule(path)) or 0.0
        done += whole * float(live.float().mean())
        total += whole
    return done / total if total else None


def _plans(
    model: nn.Module,
    call: Run,
    calibration: Sequence[Any],
    live: Mapping[float, Mapping[str, float]],
) -> Iterator[tuple[float, Plan | LayerPlan]]:
    whole = {p for p in layers_of(model) if any(p in f for f in live.values())}
    if whole:
        ranking = rank_layers(model, call, calibration)
        for active, fractions in live.items():
            share = [f for p, f in fractions.items() if p in whole]
            for way in layer_plans(ranking, sum(share) / len(share)):
                yield active, way
        return
    units, weights = prunable(model), weights_of(model)
    if not live or not units:
        return
    rankings = rank(model, call, calibration)
    for active, fractions in live.items():
        layers = {p: f for p, f in fractions.items() if p in rankings}
        if not layers:
            continue
        even = dict.fromkeys(layers, 0.0)
        for kind in {type(u) for u in units.values()}:
            same = {p: layers[p] for p in layers if type(units[p]) is kind}
            even |= dict.fromkeys(same, weighted(same, weights) if same else 0.0)
        ranked = "ranked by variance, mean added back"
        ways = [(ranked, even, False), (f"{ranked}, budgets of the routed layers", layers, False)]
        if any(rankings[p].refit is not None for p in layers):
            refit = "ranked by variance, what stays refitted by least squares"
            ways += [(refit, even, True), (f"{refit}, budgets of the routed layers", layers, True)]
        for note, budget, again in ways:
            yield (
                active,
                plan(rankings, budget, compensate=True, note=note, refit=again, weights=weights),
            )


def weights_of(model: nn.Module) -> dict[str, float]:
    """Path -> what a module weighs in a mean over modules: the mean of each kind is one."""
    units = prunable(model)
    means: dict[type[Any], float] = {}
    for kind in {type(u) for u in units.values()}:
        same = [u.weight for u in units.values() if type(u) is kind]
        means[kind] = sum(same) / len(same)
    return {path: u.weight / means[type(u)] for path, u in units.items()}


def first_tokens(batches: Sequence[Any], tokens: int = PROBE) -> list[Any]:
    """Batches from the start, one sequence each, until ``tokens`` are there."""
    found: list[Any] = []
    seen = 0
    for batch in batches:
        rows = batch.split(1) if isinstance(batch, torch.Tensor) else [batch]
        for row in rows:
            if seen >= tokens:
                return found
            found.append(row)
            seen += tokens_in(row)
    return found


def tokens_in(batch: Any) -> int:
    """Tokens of a batch: of ids, or of a mapping with ``input_ids``."""
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    return math.prod(ids.shape)
