"""What ``bench`` measures: which models, budgets and regimes, on which tokens."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.bench import COMPILED, DENSE, DENSE_LOWERED, STEPS, Bench, Progress
from sparsify.bench_table import Benchmark, Regime
from sparsify.capture import Capture, capture
from sparsify.capture.inputs import given, natural
from sparsify.corpus import token_blocks
from sparsify.errors import BadInput, SparsifyError
from sparsify.hf import wrap
from sparsify.models import Loaded, load_model
from sparsify.report import Report
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.model import SparseModel
from sparsify.saved import load


def run(
    sparse: SparseModel,
    name: str,
    loaded: Loaded | None,
    *,
    dense: Any,
    example: Any,
    active: Sequence[float],
    tokens: Sequence[int],
    context: int,
    rounds: int,
    compiled: bool,
    seed: int,
    progress: Progress | None,
    machine: Mapping[str, Any],
) -> Benchmark:
    """Measure ``sparse``; see :func:`sparsify.api.bench`.

    Args:
        loaded: the dense model it was just made from; None = look for it.
    """
    for option, least in (("tokens", min(tokens, default=0)), ("context", context),
                          ("rounds", rounds)):  # fmt: skip
        if least < 1:
            raise BadInput(f"{option} cannot be {least}", help="at least 1")
    notes: list[str] = []
    if loaded is None or dense is not None:
        loaded, why = _dense_of(sparse, dense, example)
        notes += [why] if why else []
    kinds: dict[str, Any] = {}
    if loaded is not None and isinstance(loaded.model, nn.Module):
        kinds[DENSE] = loaded.model.eval()
        if compiled:
            kinds[COMPILED] = torch.compile(loaded.model, dynamic=False)
        ours = lowered_dense(capture(loaded.model, loaded.example), loaded.model)
        if ours is not None:
            kinds[DENSE_LOWERED] = ours
    budgets, more = _budgets(sparse, active, alone=not kinds)
    notes += more
    regimes, more = _regimes(sparse, tokens, context)
    notes += more
    if not kinds:
        notes.append("no dense model: the base is the routed model at its dense limit")
    if COMPILED not in kinds:
        notes.append("torch.compile of the dense model was not timed (--compile; takes minutes)")
    call = None if loaded is None else _arguments(loaded)
    work = Bench(sparse, kinds, ids_of(sparse, seed), call, notes=notes)
    rows = tuple(work.rows(regimes, budgets, rounds, progress))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Benchmark(name, sparse.pipeline, rows, rounds, tuple(notes), now, machine)


def lowered_dense(captured: Capture, source: nn.Module) -> SparseModel | None:
    """The dense graph with kernels for its products; None where torch's are as fast, or on GPUs.

    Kernels that also speed up what routing leaves dense are no gain of routing: the dense model is
    given them too.
    """
    model = wrap(SparseModel.of(captured), source)
    try:
        model.lower()
    except BadInput:  # no code generator in this installation
        return None
    return model if model.product is not None else None


def sparse_of(model: Any, pipeline: str | None) -> SparseModel | None:
    """The sparse model that ``model`` is or names; None where it is a dense one."""
    folder = isinstance(model, str | Path) and (Path(model) / "sparsify.json").is_file()
    if not folder and not isinstance(model, SparseModel):
        return None
    if pipeline is not None:
        raise BadInput(
            "a sparse model takes no pipeline", help="leave -p out, or name the dense model"
        )
    return model if isinstance(model, SparseModel) else load(model)


def _dense_of(sparse: SparseModel, dense: Any, example: Any) -> tuple[Loaded | None, str]:
    """The dense model of a sparse one, and why there is none."""
    report = sparse.report
    if dense is not None:
        return load_model(dense, example=example), ""
    if not isinstance(report, Report):
        return None, "the model has no report, which would name its dense model (--dense MODEL)"
    try:
        loaded = load_model(report.model, example=example)
    except SparsifyError as error:
        return None, f"{report.model} cannot be loaded again ({error.what}): --dense MODEL names it"
    size = sum(p.numel() for p in loaded.model.parameters())
    if size != report.dense.parameters:
        return None, f"{report.model} is another model now: --dense MODEL names the right one"
    return loaded, ""


def _budgets(
    sparse: SparseModel, active: Sequence[float], *, alone: bool
) -> tuple[list[float], list[str]]:
    if not sparse.active:
        return [1.0], ["nothing in this model has a budget: measured as it is"]
    budgets = list(dict.fromkeys(float(a) for a in active))
    return ([1.0, *budgets] if alone and 1.0 not in budgets else budgets), []


def _regimes(
    sparse: SparseModel, tokens: Sequence[int], context: int
) -> tuple[list[Regime], list[str]]:
    """What can be run, and what is left out and why."""
    call = sparse.call_spec
    if not isinstance(call, CausalCall):
        batch, seen = sparse.example[0].shape[0], _tokens_seen(sparse)
        note = "no language model: its example at once, whatever --tokens says"
        return [Regime(batch, max(seen // batch, 1), own=True)], [note]
    sizes = [(Regime.of(n, context), n) for n in dict.fromkeys(tokens)]
    config = getattr(sparse, "config", None)
    most = getattr(config, "max_position_embeddings", None) or math.inf
    regimes, notes = [], []
    for regime, count in sizes:
        wanted = regime.context + (STEPS if regime.decodes else regime.tokens)
        if regime.decodes and not call.layers:
            notes.append(f"{count} tokens left out: this model was captured without a cache")
        elif wanted > most:
            notes.append(f"{regime.name} left out: the model has {most} positions")
        else:
            regimes.append(regime)
    if not regimes:
        raise BadInput("nothing is left to measure", why="\n".join(notes))
    return regimes, notes


def _tokens_seen(sparse: SparseModel) -> int:
    """Tokens of the example, as routed modules count them."""
    reset(sparse)
    with torch.no_grad():
        sparse.graph(*sparse.example)
    return max((counter.tokens for _, counter in counters(sparse)), default=0)


def ids_of(sparse: SparseModel, seed: int) -> Tensor:
    """Tokens of held-out text where there is a tokenizer, else random ones; (32768,)."""
    count = 1 << 15
    if not isinstance(sparse.call_spec, CausalCall):
        return torch.empty(0, dtype=torch.int64)
    if sparse.tokenizer is None:
        g = torch.Generator().manual_seed(seed)
        low = min(4, sparse.call_spec.vocabulary - 1)
        return torch.randint(low, sparse.call_spec.vocabulary, (count,), generator=g)
    _, batches = token_blocks(
        "docstrings", sparse.tokenizer, length=256, limit=count, split="held-out", seed=seed
    )
    ids = torch.cat([batch.flatten() for batch in batches])
    return ids.repeat(-(-count // len(ids)))[:count]


def _arguments(loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not isinstance(loaded.model, nn.Module):
        return None
    return ((), natural(loaded.model)) if loaded.example is None else given(loaded.example)
