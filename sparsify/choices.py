"""Quality on multiple-choice questions: which choice does a language model find likeliest?

Every choice is read as the continuation of the question (a blank between them), and its
log-likelihood is divided by its length in characters, as the ``acc_norm`` of the usual harness is.
Files of questions: :mod:`sparsify.questions`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import contest
from sparsify.bootstrap import RESAMPLES, Bootstrap
from sparsify.contenders import BASELINES, PROBE, Contender, Run
from sparsify.corpus import encode
from sparsify.errors import BadInput
from sparsify.evaluate import logits_of
from sparsify.questions import Question
from sparsify.report import ChoiceRow, Choices

# ---------------------------------------------------------------------------- scores


@dataclasses.dataclass(frozen=True)
class Reading:
    """A question as token ids: of every choice (1, T), and where the choice starts in it."""

    rows: tuple[tuple[Tensor, int], ...]
    lengths: tuple[int, ...]  # of the choices, in characters
    answer: int

    @property
    def tokens(self) -> int:
        """Of all its choices, each read with the question."""
        return sum(ids.numel() for ids, _ in self.rows)


def reading(tokenizer: Any, question: Question) -> Reading:
    """Token ids of a question; BadInput where a choice is no token of its own."""
    alone = encode(tokenizer, question.question)
    rows = []
    for choice in question.choices:
        whole = encode(tokenizer, f"{question.question} {choice}")
        pairs = zip(alone, whole, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(whole)))
        if not 0 < same < len(whole):
            raise BadInput(
                "a choice cannot be told from its question",
                why="the tokenizer has no tokens for one of them",
                where=f"{question.question[:60]!r}, {choice[:60]!r}",
            )
        rows.append((torch.tensor([whole], dtype=torch.int64), same))
    return Reading(tuple(rows), tuple(map(len, question.choices)), question.answer)


@dataclasses.dataclass
class Answers:
    """What one model answers.

    Attributes:
        picked: of every question, the choice of the highest log-likelihood per character.
        right: of every question, whether that is the answer.
        sure: sum over questions of the answer's log-probability among the choices.
    """

    picked: list[int] = dataclasses.field(default_factory=list)
    right: list[bool] = dataclasses.field(default_factory=list)
    sure: float = 0.0

    def add(self, run: Run, question: Reading) -> None:
        """Ask one question."""
        scores = []
        for (ids, start), length in zip(question.rows, question.lengths, strict=True):
            logits = logits_of(run(ids))[0, start - 1 : -1].float().log_softmax(-1)
            chosen = logits.gather(-1, ids[0, start:, None].to(logits.device))
            scores.append(float(chosen.double().sum()) / length)
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        self.picked.append(best)
        self.right.append(best == question.answer)
        self.sure += scores[question.answer] - math.log(sum(math.exp(s) for s in scores))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / max(len(self.right), 1)


def ask(
    reference: Run,
    others: Mapping[str, Run],
    questions: Sequence[Reading],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Answers]:
    """Name -> answers of the reference (``dense``) and of the others."""
    runs = {"dense": reference, **others}
    found = {name: Answers() for name in runs}
    with torch.no_grad():
        for done, question in enumerate(questions, 1):
            for name, run in runs.items():
                found[name].add(run, question)
            if progress is not None:
                progress(done)
    return found


def choices(
    model: nn.Module,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    file: str,
    active: Sequence[float] = (1.0, 0.75, 0.5),
    calibration: Sequence[Tensor] = (),
    run: Run | None = None,
    pass_name: str | None = None,
    baselines: Sequence[str] = BASELINES,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: contest.Progress | None = None,
) -> Choices:
    """The routed model at several budgets, beside the dense model and the baselines.

    Args:
        questions: not empty; file: their name.
        Others as :func:`sparsify.evaluate.quality` takes them.
    """
    read_all = [reading(tokenizer, q) for q in questions]
    few: list[Reading] = []
    seen = 0
    for question in read_all:
        if few and seen >= PROBE:
            break
        few.append(question)
        seen += question.tokens
    held = contest.hold(
        model, run or model, read_all, ask, lambda found: (-found.accuracy, -found.sure),
        active=active, calibration=calibration, pass_name=pass_name, baselines=baselines, few=few,
        total=len(read_all), progress=progress,
    )  # fmt: skip
    drawn = Bootstrap(range(len(read_all)), row="questions", unit="questions",
                      resamples=resamples, seed=seed)  # fmt: skip
    dense = held.results["dense"]
    rows = [_row(Contender("dense", 1.0, model), dense, dense, drawn)]
    rows += [_row(c, held.results[c.name], dense, drawn) for a in active for c in held.at(a)]
    chance = sum(1 / len(q.choices) for q in questions) / len(questions)
    return Choices(file, len(questions), chance, tuple(rows), drawn.facts)


def _row(who: Contender, mine: Answers, dense: Answers, drawn: Bootstrap) -> ChoiceRow:
    same = [a == b for a, b in zip(mine.picked, dense.picked, strict=True)]
    apart = [float(a) - float(b) for a, b in zip(mine.right, dense.right, strict=True)]
    first = who.who == "dense"
    return ChoiceRow(
        who.who, who.active, who.realised(), mine.accuracy, mine.accuracy - dense.accuracy,
        sum(same) / len(same), who.note, who.flops(), drawn.mean(mine.right),
        None if first else drawn.mean(apart), None if first else drawn.mean(same),
    )  # fmt: skip
