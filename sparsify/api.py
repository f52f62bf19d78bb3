"""The front door: compile, inspect, load, verify, diff, evaluate, generate, bench, bisect, ...

Each takes a model object, or a MODEL text as on the command line (``zoo:llama``, a folder, a GGUF
file, ``module:function``, a ``.pt2`` file). The caller's model is left untouched; weights that no
pass rewrites are shared with it unless ``share=False``, so training the result in place trains
those too.
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify import bench_setup, registry, text
from sparsify.bench_table import Benchmark
from sparsify.calibration import Calibrated, Source, calibrate
from sparsify.capture import Capture, capture
from sparsify.core import Pass, Refused, Remark
from sparsify.costs import CONTEXT, facts
from sparsify.diagnose import bisect as _bisect
from sparsify.errors import BadInput, NothingMatched
from sparsify.evidence import check_end_to_end
from sparsify.findings import Bisection, Inspection, RegionRow
from sparsify.hf import wrap
from sparsify.match import find
from sparsify.measured import evaluate
from sparsify.models import Loaded, load_model
from sparsify.pipeline import (
    Progress,
    Stage,
    State,
    Verify,
    near_miss_remark,
    prepare,
    run_stage,
    stop_on_failure,
)
from sparsify.probe import annotate
from sparsify.regions import Matches, Region, Stack
from sparsify.report import Report, Step
from sparsify.reproducer import reproduce
from sparsify.rewrite import renamed
from sparsify.runtime.dial import set_active
from sparsify.runtime.graph import clone
from sparsify.runtime.model import SparseModel
from sparsify.saved import diff, generate, load, verify
from sparsify.settle import settle

__all__ = [
    "bench", "bisect", "compile", "diff", "evaluate", "generate", "inspect", "load", "reproduce",
    "verify",
]  # fmt: skip

DEFAULT_PIPELINE = "ffn-moe,attn-moh"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

Calibration = Source  # text, texts, or batches of token ids; see sparsify.calibration


def stages_of(pipeline: str) -> list[Stage]:
    """The pipeline text as passes; raises GrammarError, UnknownPass or BadOption."""
    return [Stage(registry.build(stage), stage) for stage in text.parse(pipeline)]


def compile(  # noqa: A001  (the verb of the product)
    model: Any,
    pipeline: str | None = None,
    example: Any = None,
    calibration: Calibration | None = None,
    active: float | None = None,
    *,
    tokenizer: Any = None,
    verify: Verify = "each",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    share: bool = True,
    context: int = CONTEXT,
    progress: Progress | None = None,
    on_step: Callable[[Step, State], None] | None = None,
    reproducer: str | None = ".",
) -> SparseModel:
    """Rewrite a dense model into a routed one, and prove each rewrite at its dense limit.

    Args:
        model: an ``nn.Module`` (transformers, diffusers or your own), an ``ExportedProgram``, a
            ``torch.fx.GraphModule``, or a MODEL text.
        pipeline: passes with options, e.g. ``"ffn-moe{experts=64 active=0.5},attn-moh"``; default
            ``"ffn-moe,attn-moh"``.
        example: inputs to capture with: a tensor, a tuple of arguments, a dict of keywords, or
            (args, kwargs). transformers models need none.
        calibration: what to fit routers on: a built-in text, a file (text or JSONL), an iterable of
            texts, or one of batches: token ids (batch, token), or mappings from argument to tensor.
            It is read once, as a stream. Routers are made from the weights without it.
        active: budget to start with for the whole model, 0 < active <= 1; turn it later with
            ``set_active``. Default: what each pass's ``active`` option says (1 = all).
        tokenizer: for texts; taken from the model's folder where there is one. Saved with the
        model.
        verify: ``each`` checks claims after every pass, ``end`` once, ``off`` never.
        dtype: convert a copy of the model to this dtype first.
        seed: of calibration sampling.
        share: share the weights that no pass moves with the caller's model (no copy): training
            the result in place trains them there too. False copies them.
        context: keys per token that the report's attention cost counts.
        progress: called with (what, done, total) during long work.
        on_step: called after each pass with its Step and the pipeline's State.
        reproducer: folder under which a failed claim leaves its reproducer.

    Returns:
        A SparseModel with the model's call signature; for a transformers model also an instance of
        its class (``generate``, ``config``, ``save_pretrained``). ``.report`` says what happened.

    Raises:
        CaptureFailed, NothingMatched, ClaimFailed, BadInput, BadOption, GrammarError, UnknownPass,
        ModelNotFound, ModelUnreadable, BadWeights.
    """
    stages = stages_of(pipeline if pipeline is not None else DEFAULT_PIPELINE)
    if not stages:
        raise BadInput("the pipeline is empty", help=f"for example: {DEFAULT_PIPELINE}")
    if active is not None:
        check_budget(active)
    seconds: dict[str, float] = {}
    loaded, captured, matches = _prepare(
        model, example, tokenizer, _dtype(dtype), share, seconds, progress
    )
    wanted = {stage.work.region_type for stage in stages}
    if not any(matches.of(kind) for kind in wanted):
        raise _nothing(loaded.name, wanted, matches)
    state = prepare(captured.graph, captured.example, captured.golden, matches)
    dense = facts(state.gm, matches.regions, context=context)
    start = time.perf_counter()
    fitted = _calibrate(loaded, captured, stages, state, calibration, seed, progress)
    if calibration is not None:
        seconds["calibrate"] = time.perf_counter() - start
    steps: list[Step] = []
    for stage in stages:
        step = run_stage(
            state, stage, verify=verify, context=context, progress=progress, reproducer=reproducer
        )
        if state.moved:  # this pass took modules of earlier ones along
            steps = [
                dataclasses.replace(s, weights=tuple(renamed(s.weights, state.moved)))
                for s in steps
            ]
            state.moved.clear()
        steps.append(step)
        seconds[step.pass_name] = seconds.get(step.pass_name, 0.0) + step.seconds
        if on_step is not None:
            on_step(step, state)
    if fitted.settle and state.made:
        start = time.perf_counter()
        settle(state.gm, state.made, *fitted.settle, progress=progress)
        seconds["settle"] = time.perf_counter() - start
    if verify == "off" or not state.claims:
        last = None
    else:
        last = next((e for e in steps[-1].evidence if e.scope == "end-to-end"), None)
        last = last or check_end_to_end(state.gm, state.example, state.golden, state.claims)
        stop_on_failure(state, None, [last], reproducer)
    if active is not None and state.claims:
        set_active(state.gm, active)
    annotate(state.gm, state.example)
    shown = text.unparse([stage.text for stage in stages])
    report = Report(
        version=_version(),
        model=loaded.name,
        pipeline=shown,
        active=active,
        dtype=str(captured.dtype).removeprefix("torch."),
        seconds=seconds,
        machine=machine(),
        dense=dense,
        sparse=facts(state.gm, matches.regions, context=context),
        steps=tuple(steps),
        near_misses=tuple(near_miss_remark(m, "") for m in matches.near_misses),
        end_to_end=last,
        context=context,
        calibration=fitted.name and f"{fitted.name}, {fitted.tokens} tokens",
        notes=(*loaded.notes, *captured.notes),
    )
    result = SparseModel(
        state.gm,
        captured.call,
        pipeline=shown,
        report=report,
        example=captured.example,
        golden=captured.golden,
        borrowed=share,
    )
    result.tokenizer = loaded.tokenizer
    result.reset_counters()
    return wrap(result, captured.source) if isinstance(captured.source, nn.Module) else result


def inspect(model: Any, example: Any = None, *, progress: Progress | None = None) -> Inspection:
    """What the matcher finds in a model, what could apply to it, and the near misses."""
    seconds: dict[str, float] = {}
    loaded, captured, matches = _prepare(model, example, None, None, True, seconds, progress)
    rows = []
    for region in (*matches.regions, *matches.stacks):
        applies: list[str] = []
        refused: list[Remark] = []
        inside = region.layers if isinstance(region, Stack) else region.parts
        for name, cls in registry.all_passes().items():
            mine = [r for r in (region, *inside) if isinstance(r, cls.region_type)]
            left = [remark for r in mine if (remark := _refusal(cls(), r)) is not None]
            if len(left) < len(mine):
                applies.append(name)
            else:
                refused += {r.reason: r for r in left}.values()  # parts often say the same
        rows.append(
            RegionRow(
                region.path,
                region.kind,
                region.facts(),
                region.where,
                region.block,
                tuple(applies),
                tuple(refused),
            )
        )
    shown = facts(captured.graph, matches.regions)
    runs = {b.fingerprint: b for b in reversed(matches.blocks)}
    return Inspection(
        model=loaded.name,
        kind=captured.kind,
        nodes=shown.nodes,
        parameters=shown.parameters,
        regions=tuple(rows),
        near_misses=tuple(near_miss_remark(m, "") for m in matches.near_misses),
        blocks=tuple(
            {"path": b.path, "count": b.count, "regions": list(b.regions)}
            for b in reversed(runs.values())
        ),
        notes=captured.notes,
        seconds=seconds,
    )


def _refusal(work: Pass[Any], region: Region) -> Remark | None:
    """Why a pass would leave the region dense; None where it would not."""
    try:
        work.check(region)
    except Refused as error:
        reason, help = error.reason, error.suggestion  # noqa: A001
        return Remark("left", work.name, region.path, region.kind, reason, help, region.where)
    return None


# ---------------------------------------------------------------------------- parts


def check_budget(active: float) -> None:
    """BadInput unless 0 < active <= 1."""
    if isinstance(active, bool) or not isinstance(active, int | float) or not 0 < active <= 1:
        raise BadInput(f"active={active!r} is not a budget", help="0 < active <= 1; 0.5 uses half")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise BadInput(f"no dtype '{dtype}'", help=f"one of: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _prepare(
    model: Any,
    example: Any,
    tokenizer: Any,
    dtype: torch.dtype | None,
    share: bool,
    seconds: dict[str, float],
    progress: Progress | None,
) -> tuple[Loaded, Capture, Matches]:
    """Load, capture, match; a ready Capture is cloned (weights shared), not captured again."""
    start = time.perf_counter()
    if isinstance(model, Capture):
        name = type(model.source).__name__ if model.source is not None else "captured model"
        loaded = Loaded(model.source, tokenizer, None, name, "object")
        captured = dataclasses.replace(model, graph=share_clone(model.graph))
        if not share:
            captured = dataclasses.replace(model, graph=clone(model.graph))
    else:
        loaded = load_model(model, example=example, tokenizer=tokenizer)
        if progress is not None:
            progress("capture", 0, 1)
        dense = loaded.model
        if isinstance(dense, nn.Module) and _differs(dense, dtype):
            dense = copy.deepcopy(dense).to(dtype)
        captured = capture(dense, loaded.example, share=share)
        if progress is not None:
            progress("capture", 1, 1)
    seconds["capture"] = time.perf_counter() - start
    start = time.perf_counter()
    matches = find(captured.graph, captured.example)
    seconds["match"] = time.perf_counter() - start
    return loaded, captured, matches


def _differs(model: nn.Module, dtype: torch.dtype | None) -> bool:
    return dtype is not None and any(
        p.is_floating_point() and p.dtype != dtype for p in model.parameters()
    )


def share_clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A clone of the graph and its module tree over the same parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    return clone(gm, memo)


def _nothing(name: str, wanted: set[type[Any]], matches: Matches) -> NothingMatched:
    kinds = " or ".join(sorted(k.kind for k in wanted))
    shown = [
        f"near miss: {m.kind} at {m.path}: {m.role}: {m.reason}"
        + (f"\n  --> {m.where}" if m.where else "")
        for m in matches.near_misses[:5]
    ]
    found = sorted({r.kind for r in matches.regions})
    return NothingMatched(
        f"no {kinds} region in {name}",
        why=f"it has {', '.join(found)} regions only" if found else None,
        where="\n".join(shown)
        or "no near miss either: nothing looks like attention or a feed-forward layer",
        help="sparsify inspect MODEL shows what the matcher sees",
    )


def _calibrate(
    loaded: Loaded,
    captured: Capture,
    stages: Sequence[Stage],
    state: State,
    calibration: Calibration | None,
    seed: int,
    progress: Progress | None,
) -> Calibrated:
    """Fill the regions' samples with what the passes ask for."""
    if calibration is None:
        return Calibrated()
    wants = []
    for region in state.matches.all_regions:
        ports: dict[str, int] = {}
        for stage in stages:
            if isinstance(region, stage.work.region_type) and stage.selects(region):
                for port, count in stage.work_at(region.path).taps(region).items():
                    ports[port] = max(ports.get(port, 0), count)
        if ports:
            wants.append((region, ports))
    return calibrate(
        state.gm, captured.call, wants, calibration, loaded.tokenizer, seed=seed, progress=progress
    )


def bisect(
    model: Any,
    pipeline: str,
    example: Any = None,
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bisection:
    """Which pass and region of ``pipeline`` first breaks a claim on ``model``."""
    stages = stages_of(pipeline)
    loaded, captured, _ = _prepare(model, example, None, None, True, {}, progress)

    def fresh() -> State:
        graph = share_clone(captured.graph)
        matches = find(graph, captured.example)
        state = prepare(graph, captured.example, captured.golden, matches)
        _calibrate(loaded, captured, stages, state, calibration, seed, None)
        return state

    return _bisect(fresh, stages, text.unparse([s.text for s in stages]), progress)


def bench(
    model: Any,
    pipeline: str | None = None,
    *,
    active: Sequence[float] = (1.0, 0.75, 0.5),
    tokens: Sequence[int] = (1, 8, 64, 512),
    context: int = 128,
    rounds: int = 9,
    dense: Any = None,
    compiled: bool = False,
    example: Any = None,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Time a routed model beside the dense one and the ideal, interleaved in one run.

    Args:
        model: a dense model as for :func:`compile` (with ``pipeline``), or a sparse one: a folder
            that ``save`` wrote, or a SparseModel.
        active: budgets to measure at.
        tokens: up to 8: decode one token for each of so many sequences; more: prefill.
        context: tokens in the cache before a decoded one.
        rounds: that count; every round runs everything once.
        dense: the dense model of a sparse ``model``; default: the one it was compiled from, where
            that can be loaded again, else the sparse model with everything live is the base.
        compiled: time ``torch.compile`` of the dense model too (takes minutes).
        example, calibration, tokenizer, seed: as for :func:`compile`.
        progress: called with (what, done, total) during long work.

    Raises:
        BadInput: no pipeline for a dense model, one for a sparse model, or values out of range.
        And as :func:`compile` and :func:`load`.
    """
    for budget in active:
        check_budget(budget)
    sparse = bench_setup.sparse_of(model, pipeline)
    loaded, name = None, str(model)
    if sparse is None:
        if pipeline is None:
            raise BadInput(
                "bench needs a pipeline for a dense model",
                help="-p 'ffn-moe', or name a folder that sparsify compile wrote",
            )
        loaded = load_model(model, example=example, tokenizer=tokenizer)
        sparse = compile(
            loaded.model, pipeline, loaded.example, calibration, tokenizer=loaded.tokenizer,
            verify="off", seed=seed, context=context, progress=progress,
        )  # fmt: skip
        name = loaded.name
    elif isinstance(model, SparseModel):
        name = sparse.call_spec.model
    return bench_setup.run(
        sparse, name, loaded, dense=dense, example=example, active=active, tokens=tokens,
        context=context, rounds=rounds, compiled=compiled, seed=seed, progress=progress,
        machine={"sparsify": _version(), **machine()},
    )  # fmt: skip


def machine() -> dict[str, Any]:
    """What timings depend on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def _version() -> str:
    import sparsify

    return sparsify.__version__
