"""Run passes over a captured graph: refuse or rewrite, splice, check the claim, write the step.

Every region of a pass's type gets exactly one remark from every stage. A failed claim stops the run
with a reproducer folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from sparsify import registry
from sparsify.core import Moved, Pass, Refused, Remark, Rewrite
from sparsify.costs import facts
from sparsify.errors import ClaimFailed
from sparsify.evidence import Proven, check_end_to_end, check_regions, key
from sparsify.probe import annotate
from sparsify.regions import Matches, NearMiss, Region
from sparsify.report import Evidence, Step
from sparsify.reproducer import write_reproducer
from sparsify.rewrite import finish, install, node_count, renamed, splice
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.dial import routers, set_each, turn
from sparsify.text import StageText, match_path, unparse

Verify = Literal["each", "end", "off"]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pass with the part of the pipeline text that asked for it."""

    work: Pass[Any]
    text: StageText

    def selects(self, region: Region) -> bool:
        """Whether ``at=`` and ``skip=`` let this stage work on the region."""
        return self.text.selects(region.path)

    def work_at(self, path: str) -> Pass[Any]:
        """The pass with the options of the region at ``path``."""
        return registry.build(self.text, path) if self.text.local else self.work


@dataclasses.dataclass(frozen=True)
class Placed:
    """Routers that a stage made for a region; ``stage`` is its index in the pipeline."""

    stage: int
    pass_name: str
    region: str
    routers: tuple[Budgeted, ...]


@dataclasses.dataclass
class State:
    """What a run of passes changes: the graph, its regions, the stages and claims so far.

    ``dense`` holds every region's result on the example before any rewrite (float, small),
    ``made`` the modules spliced in, ``placed`` their routers, ``proven`` what each module was
    claimed to keep.
    """

    gm: fx.GraphModule
    example: tuple[Tensor, ...]
    golden: tuple[Tensor, ...]
    matches: Matches
    dense: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    claims: list[Proven] = dataclasses.field(default_factory=list)
    stages: list[Stage] = dataclasses.field(default_factory=list)
    made: list[tuple[nn.Module, Pass[Any]]] = dataclasses.field(default_factory=list)
    placed: list[Placed] = dataclasses.field(default_factory=list)
    proven: dict[nn.Module, Proven] = dataclasses.field(default_factory=dict)
    moved: dict[str, str] = dataclasses.field(default_factory=dict)  # routed modules: was -> is
    only: Callable[[Region], bool] | None = None  # bisect narrows the regions with this


def prepare(
    gm: fx.GraphModule, example: tuple[Tensor, ...], golden: tuple[Tensor, ...], matches: Matches
) -> State:
    """The state before the first pass; records every region's dense result."""
    regions = matches.all_regions
    for region in regions:
        region.ports["y"].meta["keep"] = True
    kept = annotate(gm, example)
    dense = {key(r): kept[r.ports["y"]].detach().clone() for r in regions}
    for region in regions:
        region.ports["y"].meta.pop("keep", None)  # a projection may share it with its region
    return State(gm, example, golden, matches, dense)


def run_stage(
    state: State,
    stage: Stage,
    *,
    verify: Verify = "each",
    context: int = 512,
    progress: Progress | None = None,
    reproducer: str | None = ".",
) -> Step:
    """One pass over all its regions.

    Args:
        state: changed in place.
        stage: the pass and its selectors.
        verify: ``each`` checks regions and end to end now, ``end`` leaves it to the caller,
        ``off``.
        context: keys per token that the attention cost counts.
        progress: called with (pass name, regions done, regions).
        reproducer: folder under which a failed claim writes its reproducer, None = nowhere.

    Raises:
        ClaimFailed: naming the pass and the worst region.
    """
    start = time.perf_counter()
    work = stage.work
    state.stages.append(stage)
    before = facts(state.gm, state.matches.regions, context=context)
    nodes_before = node_count(state.gm)
    remarks: list[Remark] = []
    moved: list[Moved] = []
    done: list[tuple[Region, list[Proven]]] = []
    everything = state.matches.all_regions
    mine = state.matches.of(work.region_type)
    for number, region in enumerate(mine):
        outcome = _one(state, stage, region)
        if isinstance(outcome, Remark):
            remarks.append(outcome)
        else:
            own = (outcome.claim or work.claim, outcome.length or region.length)
            taken = [state.gm.get_submodule(path) for path in outcome.moved]
            if region.host is not None:
                taken.append(region.host.module)
            held = [m for module in taken for m in module.modules()]
            inside = dict.fromkeys(state.proven[m] for m in held if m in state.proven)
            if outcome.hosted is not None:
                names = install(region, outcome, work.name)
                own = (own[0], region.whole.length)
            else:
                names = splice(state.gm, region, outcome, work.name, everything)
            new = _modules(outcome)
            local = stage.work_at(region.path)
            state.made += [(module, local) for module in new]
            held = [m for module in new for m in module.modules()]
            found = {m: None for m in held if isinstance(m, Budgeted) and not m.led}
            at = len(state.stages) - 1
            state.placed.append(Placed(at, work.name, region.path, tuple(found)))
            for was, now in outcome.moved.items():
                state.moved[was] = next(
                    (now.replace(a, b, 1) for a, b in names.items() if now.startswith(f"{a}.")), now
                )
            done.append((region, [own, *inside]))
            state.proven |= dict.fromkeys(new, own)
            moved.extend(renamed(outcome.weights, names))
            remarks.append(
                Remark(
                    "applied", work.name, region.path, region.kind, outcome.note, None, region.where
                )
            )
        if region.rewritten_by is not None:
            region.samples = {}  # large, and used up
        if progress is not None:
            progress(work.name, number + 1, len(mine))
    if done or len(state.stages) == 1:  # the first one also drops what the capture left unread
        finish(state.gm)
    remarks += [
        near_miss_remark(m, work.name)
        for m in state.matches.near_misses
        if m.kind == work.region_type.kind
    ]
    state.claims += [claims[0] for _, claims in done]
    evidence: list[Evidence] = []
    if done and verify == "each":
        others = [r for r in everything if r.rewritten_by is not None]
        evidence = check_regions(state.gm, state.example, done, state.dense, others)
        evidence.append(check_end_to_end(state.gm, state.example, state.golden, state.claims))
        stop_on_failure(state, stage, evidence, reproducer)
    if done:
        _turn_dials(state, stage)
    after = facts(state.gm, state.matches.regions, context=context)
    return Step(
        pass_name=work.name,
        options=str(stage.text),
        claim=str(work.claim),
        remarks=tuple(remarks),
        nodes_before=nodes_before,
        nodes_after=node_count(state.gm),
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        before=before,
        after=after,
        weights=tuple(moved),
        evidence=tuple(evidence),
        seconds=time.perf_counter() - start,
    )


def _turn_dials(state: State, stage: Stage) -> None:
    """Set this stage's routers to its ``active``: local budgets as they are, the other one spread.

    A budget that is local to a pattern is that of each region it matches.
    """
    active = getattr(stage.work, "active", None)
    if not isinstance(active, float):
        return
    mine = [p for p in state.placed if p.stage == len(state.stages) - 1]
    local = [pattern for key, pattern, _ in stage.text.local if key == "active"]
    own: dict[Budgeted, float] = {}
    for placed in mine:
        if any(match_path(pattern, placed.region) for pattern in local):
            here: Any = stage.work_at(placed.region)
            own |= dict.fromkeys(placed.routers, here.active)
    paths = {router: path for path, router in routers(state.gm)}
    spread = [(paths[r], r) for p in mine for r in p.routers if r in paths and r not in own]
    if spread:
        turn(state.gm, spread, active)
    if own:
        set_each(state.gm, own)


def _one(state: State, stage: Stage, region: Region) -> Remark | Rewrite:
    """The rewrite of one region, or why it stays as it is."""
    work = stage.work_at(region.path)

    def left(reason: str, suggestion: str | None = None) -> Remark:
        return Remark("left", work.name, region.path, region.kind, reason, suggestion, region.where)

    if not stage.selects(region) or (state.only is not None and not state.only(region)):
        return left("not selected by at= / skip=")
    if region.rewritten_by is not None:
        return left(f"already rewritten by {region.rewritten_by}")
    if region.blocked is not None and not (work.works_inside and region.host is not None):
        return left(region.blocked)
    try:
        work.check(region)
        with torch.no_grad():
            rewrite = work.rewrite(region)
    except Refused as refused:
        return left(refused.reason, refused.suggestion)
    for module in _modules(rewrite):
        module.pass_name = work.name  # type: ignore[assignment]
        module.eval()  # as the captured graph is: no noise, no choice among later tokens
    return rewrite


def _modules(rewrite: Rewrite) -> list[nn.Module]:
    """The modules that a rewrite makes."""
    hosted = [] if rewrite.hosted is None else [rewrite.hosted]
    return [*(part.module for part in rewrite.splices), *hosted]


def near_miss_remark(miss: NearMiss, pass_name: str) -> Remark:
    """A near miss as a remark."""
    return Remark(
        "near-miss",
        pass_name,
        miss.path,
        miss.kind,
        f"{miss.role}: {miss.reason}",
        None,
        miss.where,
    )


def stop_on_failure(
    state: State, stage: Stage | None, evidence: Sequence[Evidence], reproducer: str | None
) -> None:
    """Raise ClaimFailed for the worst failed evidence, after writing its reproducer.

    Args:
        stage: the one to blame; None = any of those run so far.
    """
    failed = [e for e in evidence if not e.ok]
    if not failed:
        return
    worst = max(failed, key=lambda e: (e.scope == "region", e.error / max(e.tolerance, 1e-300)))
    kind = stage.work.region_type if stage is not None else Region
    by_path = {r.path: r for r in state.matches.of(kind)}
    region = by_path.get(worst.region) if worst.scope == "region" else None
    region = None if region is None else region.whole
    pipeline = unparse([s.text for s in state.stages])
    folder = None
    if reproducer is not None and region is not None:
        marks = {
            r.ports["y"]: state.dense[key(r)]
            for r in state.matches.all_regions
            if r.rewritten_by is not None
        }
        folder = write_reproducer(
            reproducer,
            state.gm,
            state.example,
            region,
            state.dense[key(region)],
            str(stage.text) if stage is not None else pipeline,
            worst,
            marks,
        )
    place = worst.region or "the model's outputs"
    error = ClaimFailed(
        f"{stage.work.name if stage else pipeline} does not keep its claim at {place}",
        why=f"claim {worst.claim} at the dense limit: error {worst.error:.3g} > tolerance "
        f"{worst.tolerance:.3g} (output scale {worst.scale:.3g}, {worst.dtype}); "
        f"{len(failed)} of {len(evidence)} checks failed",
        where=f"--> {region.where}" if region is not None else None,
        help=(
            f"sparsify reproduce {folder}"
            if folder
            else f"sparsify bisect MODEL -p '{pipeline}' names the region"
        ),
    )
    error.reproducer = folder
    error.evidence = tuple(failed)
    raise error


def summary(steps: Sequence[Step]) -> Mapping[str, int]:
    """How many regions each pass changed."""
    return {s.pass_name: sum(r.kind == "applied" for r in s.remarks) for s in steps}
