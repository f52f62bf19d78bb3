"""The verb ``evaluate``: quality of a sparse model on text, on questions, on sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify import choices as multiple_choice
from sparsify import questions as question_files
from sparsify.bootstrap import RESAMPLES
from sparsify.calibration import BLOCK
from sparsify.calibration import TOKENS as FITTING  # baselines are fitted on as much as routers are
from sparsify.contenders import BASELINES
from sparsify.corpus import token_text
from sparsify.embeddings import TOP, embeddings
from sparsify.errors import BadInput
from sparsify.evaluate import quality, routing
from sparsify.findings import Evaluation
from sparsify.report import Choices, Embeddings, Quality, Report, Routing
from sparsify.runtime.calling import ModuleCall
from sparsify.runtime.model import SparseModel
from sparsify.saved import load
from sparsify.sentences import Batch, longest, reads_text, sentences


def evaluate(
    model: str | Path | SparseModel,
    text: str | Path | Iterable[str] | None = None,
    *,
    choices: str | Path | None = None,
    active: Sequence[float] = (1.0, 0.75, 0.5),
    calibration: Any = "docstrings",
    baselines: Sequence[str] = BASELINES,
    pass_name: str | None = None,
    tokens: int = 16384,
    questions: int = question_files.QUESTIONS,
    top: int = TOP,
    pooling: str = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Any = None,
) -> Evaluation:
    """Quality at several budgets, with the dense model and the baselines beside it.

    The dense model is the sparse one at its dense limit. A language model is measured on the text's
    next tokens (and, at the lowest budget, what its routers do), and on multiple-choice questions;
    an encoder on the embeddings of the text's sentences.

    Args:
        model: a saved folder, or a model in memory with a tokenizer.
        text: a file (text or JSONL), an iterable of texts, or a built-in kind (``docstrings``,
            ``licences``, ``reference``, ``code``: their held-out half).
        choices: a JSONL file of questions; see :mod:`sparsify.questions`.
        active: budgets to measure at.
        calibration: text on which baselines are fitted; None leaves them out.
        baselines: ``static`` (static pruning) and ``teal``.
        pass_name: turn only this pass's dials; the rest is all live.
        tokens: of the text, at most; questions: of the file, at most: seeded samples.
        top: an encoder's neighbours that are compared; pooling: ``mean`` or ``first``.
        resamples: of the bootstrap intervals; 0 makes none. seed: of samples and resamples.
        progress: called with (what, done, total).

    Raises:
        BadInput: neither text nor choices; a model without a tokenizer or of another kind; text or
            questions that cannot be read.
    """
    if text is None and choices is None:
        raise BadInput("there is nothing to measure on", help="a text, or choices=FILE")
    for baseline in baselines:
        if baseline not in BASELINES:
            raise BadInput(f"no baseline '{baseline}'", help=f"one of: {', '.join(BASELINES)}")
    sparse = model if isinstance(model, SparseModel) else load(model)
    call = sparse.call_spec
    encoder = isinstance(call, ModuleCall) and reads_text(call.captured)
    if sparse.kind != "causal-lm" and (not encoder or choices is not None):
        raise BadInput(
            "only language models answer questions"
            if encoder
            else "only language models and encoders of text can be measured on text",
            help=f"this is a {sparse.kind}",
        )
    if sparse.tokenizer is None:
        raise BadInput("the model has no tokenizer", help="compile with tokenizer=...")
    common = _Common(
        active=active, calibration=calibration, baselines=baselines, pass_name=pass_name,
        resamples=resamples, seed=seed, progress=progress,
    )  # fmt: skip
    found = Evaluation(_name(model), sparse.pipeline)
    if text is not None and encoder:
        made = _embeddings(sparse, text, tokens, top, pooling, common)
        found = dataclasses.replace(found, embeddings=made)
    elif text is not None:
        measured, routed = _quality(sparse, text, tokens, common)
        found = dataclasses.replace(found, quality=measured, routing=routed)
    if choices is not None:
        answered = _choices(sparse, choices, questions, common)
        found = dataclasses.replace(found, choices=answered)
    if isinstance(sparse.report, Report):
        parts = ("quality", "routing", "choices", "embeddings")
        fresh = {n: getattr(found, n) for n in parts if getattr(found, n) is not None}
        if text is not None and not encoder:
            fresh["routing"] = found.routing  # also where there is nothing to tell
        sparse.report = dataclasses.replace(sparse.report, **fresh)
    return found


@dataclasses.dataclass(frozen=True)
class _Common:
    """What every measure is told."""

    active: Sequence[float]
    calibration: Any
    baselines: Sequence[str]
    pass_name: str | None
    resamples: int
    seed: int
    progress: Any

    @property
    def needs_text(self) -> bool:
        """Whether there are baselines to fit."""
        return self.calibration is not None and bool(self.baselines)

    def options(self) -> dict[str, Any]:
        """As keywords; the calibration text is left to the measure."""
        return {
            "active": self.active, "baselines": self.baselines, "pass_name": self.pass_name,
            "resamples": self.resamples, "seed": self.seed, "progress": self.progress,
        }  # fmt: skip


def _name(model: Any) -> str:
    return "model in memory" if isinstance(model, SparseModel) else str(model)


def _ids_run(sparse: SparseModel) -> Any:
    def run(ids: torch.Tensor) -> Any:
        return sparse(input_ids=ids, use_cache=False)

    return run


def _fitting_blocks(sparse: SparseModel, common: _Common) -> list[torch.Tensor]:
    if not common.needs_text:
        return []
    found = token_text(
        common.calibration,
        sparse.tokenizer,
        length=BLOCK,
        limit=FITTING,
        seed=common.seed,
    )
    return list(found.batches)


def _quality(
    sparse: SparseModel, text: Any, tokens: int, common: _Common
) -> tuple[Quality, Routing | None]:
    held = token_text(
        text, sparse.tokenizer, length=BLOCK, limit=tokens, split="held-out", seed=common.seed
    )
    batches, run = list(held.batches), _ids_run(sparse)
    found = quality(
        sparse, batches, text=held.name, calibration=_fitting_blocks(sparse, common), run=run,
        texts=held.texts, **common.options(),
    )  # fmt: skip
    lowest, routed = min(common.active, default=1.0), None
    if lowest < 1:
        routed = routing(
            sparse, batches, text=held.name, active=lowest, run=run, pass_name=common.pass_name
        )
    return found, routed


def _choices(sparse: SparseModel, file: str | Path, most: int, common: _Common) -> Choices:
    asked = question_files.sample(question_files.read(file), most, common.seed)
    return multiple_choice.choices(
        sparse, asked, sparse.tokenizer, file=str(file),
        calibration=_fitting_blocks(sparse, common), run=_ids_run(sparse), **common.options(),
    )  # fmt: skip


def _embeddings(
    sparse: SparseModel, text: Any, tokens: int, top: int, pooling: str, common: _Common
) -> Embeddings:
    call = sparse.call_spec
    assert isinstance(call, ModuleCall)
    options: dict[str, Any] = {"seed": common.seed, "most": longest(call.slots)}
    held = sentences(
        text, sparse.tokenizer, call.captured, limit=tokens, split="held-out", **options
    )
    fitted: Sequence[Batch] = ()
    if common.needs_text:
        fitted = sentences(
            common.calibration, sparse.tokenizer, call.captured, limit=FITTING, **options
        ).batches

    def run(batch: Any) -> Any:
        return sparse(**batch)

    return embeddings(
        sparse, held, calibration=fitted, run=run, top=top, pooling=pooling, **common.options()
    )
