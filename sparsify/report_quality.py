"""What a model's quality is, beside the dense model and the baselines: plain data for the report.

Three measures: next tokens of a text, multiple-choice questions, and embeddings of sentences. Each
has one row per model and budget. Intervals are 95 % bootstrap intervals, paired with the dense
model: the same resamples serve every row. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Who = Literal["dense", "routed", "static pruning", "TEAL"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The middle 95 % of a statistic over resamples."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width: what stands after the plus-minus sign."""
        return (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True)
class Resampled:
    """What was drawn, with replacement, for the intervals.

    Attributes:
        unit: what is drawn, e.g. ``texts`` or ``questions``.
        count: how many of them there are; resamples: how many times as many were drawn.
        seed: of the draws.
    """

    unit: str
    count: int
    resamples: int
    seed: int

    def text(self) -> str:
        """One line under a table."""
        return (
            f"± half of the 95 % interval over {self.resamples:,} resamples of "
            f"{self.count:,} {self.unit}, paired with dense"
        )


@dataclasses.dataclass(frozen=True)
class QualityRow:
    """Quality of one model at one budget.

    Attributes:
        model: ``dense``, ``routed``, or a baseline: ``static pruning`` (the same units dropped for
            every token), ``TEAL`` (small inputs of each matrix dropped, arXiv:2408.14690).
        active: the budget that was asked for; realised: the fraction that really ran.
        perplexity: on the text; ratio: to the dense model's.
        kl: mean KL divergence of next-token distributions from the dense model's, in nats.
        top1: how often the most likely next token is the dense model's.
        note: how it was made, e.g. ``energy, mean compensated``.
        flops: counted operations of the rewritten matrices, routers included, over the dense ones'.
        ratio_within, kl_within, top1_within: their intervals.
        to_routed: interval of this baseline's perplexity over the routed model's at its budget.
    """

    model: Who
    active: float
    realised: float | None
    perplexity: float
    ratio: float
    kl: float | None = None
    top1: float | None = None
    note: str = ""
    flops: float | None = None
    ratio_within: Interval | None = None
    kl_within: Interval | None = None
    top1_within: Interval | None = None
    to_routed: Interval | None = None


@dataclasses.dataclass(frozen=True)
class Quality:
    """Quality rows measured on one text of ``tokens`` tokens."""

    text: str
    tokens: int
    rows: tuple[QualityRow, ...]
    resampled: Resampled | None = None

    def row(self, model: Who, active: float | None = None) -> QualityRow | None:
        """The row of ``model`` at ``active`` (any budget if None)."""
        for row in self.rows:
            if row.model == model and (active is None or abs(row.active - active) < 1e-6):
                return row
        return None

    def verdicts(self) -> tuple[str, ...]:
        """One sentence per budget and baseline: does routing beat it at the same budget?"""
        found = []
        for row in self.rows:
            if row.model != "routed" or row.active >= 1:
                continue
            at = f"At {row.active:.0%} active"
            static = self.row("static pruning", row.active)
            if static is None:
                found.append(f"{at}, static pruning was not measured: no baseline to compare with.")
            elif static.perplexity <= row.perplexity:
                found.append(
                    f"{at}, static pruning is at least as good as this routed model (perplexity "
                    f"{number(static.perplexity)} against {number(row.perplexity)}"
                    f"{_sure(static)}): "
                    "do not use this recipe at this budget."
                )
            else:
                found.append(
                    f"{at}, the routed model is better than static pruning (perplexity "
                    f"{number(row.perplexity)} against {number(static.perplexity)}{_sure(static)})."
                )
            teal = self.row("TEAL", row.active)
            if teal is not None:
                word = "better" if row.perplexity < teal.perplexity else "no better"
                found.append(
                    f"{at}, the routed model is {word} than TEAL at as many operations (perplexity "
                    f"{number(row.perplexity)} against {number(teal.perplexity)}{_sure(teal)})."
                )
        return tuple(found)

    def render(self, width: int = 100, *, stable: bool = False) -> str:
        """The table and the verdicts as plain text."""
        from sparsify.report_text import render_quality

        return render_quality(self, width=width, stable=stable)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the verdicts."""
        from sparsify.report_json import encode

        return {**encode(self), "verdicts": list(self.verdicts())}

    @property
    def static_wins(self) -> bool:
        """Whether static pruning is at least as good at some budget: a bug in the recipe."""
        return any("do not use" in verdict for verdict in self.verdicts())


def _sure(baseline: QualityRow) -> str:
    """Whether the interval of the two models' ratio leaves out one."""
    within = baseline.to_routed
    if within is None:
        return ""
    outside = within.low > 1 or within.high < 1
    return "" if outside else "; the difference lies within the noise of this text"


@dataclasses.dataclass(frozen=True)
class ChoiceRow:
    """Answers of one model at one budget to multiple-choice questions.

    Attributes:
        model, active, realised, flops, note: as in :class:`QualityRow`.
        accuracy: share of questions answered as the file says.
        difference: accuracy less the dense model's.
        agreement: share of questions where it picks what the dense model picks.
    """

    model: Who
    active: float
    realised: float | None
    accuracy: float
    difference: float
    agreement: float
    note: str = ""
    flops: float | None = None
    accuracy_within: Interval | None = None
    difference_within: Interval | None = None
    agreement_within: Interval | None = None


@dataclasses.dataclass(frozen=True)
class Choices:
    """Multiple-choice questions of one file; ``chance`` is the accuracy of guessing."""

    file: str
    questions: int
    chance: float
    rows: tuple[ChoiceRow, ...]
    resampled: Resampled | None = None

    def render(self, width: int = 100, *, stable: bool = False) -> str:
        """The table as plain text."""
        from sparsify.report_text import render_choices

        return render_choices(self, width=width, stable=stable)


@dataclasses.dataclass(frozen=True)
class EmbeddingRow:
    """Embeddings of one model at one budget, held against the dense model's.

    Attributes:
        model, active, realised, flops, note: as in :class:`QualityRow`.
        cosine: mean cosine of a sentence's two embeddings; worst: the lowest one.
        neighbours: share of a sentence's nearest sentences that both models name.
    """

    model: Who
    active: float
    realised: float | None
    cosine: float
    worst: float
    neighbours: float
    note: str = ""
    flops: float | None = None
    cosine_within: Interval | None = None
    neighbours_within: Interval | None = None


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of ``sentences`` sentences; ``top`` nearest ones are compared.

    ``pooling`` says how a sentence's token vectors become one: ``mean`` or ``first``.
    """

    text: str
    sentences: int
    tokens: int
    top: int
    pooling: str
    rows: tuple[EmbeddingRow, ...]
    resampled: Resampled | None = None

    def render(self, width: int = 100, *, stable: bool = False) -> str:
        """The table as plain text."""
        from sparsify.report_text import render_embeddings

        return render_embeddings(self, width=width, stable=stable)


def number(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, readable: 12.5, 4,711, 1.08 M, 1.2e-07."""
    if value != value or abs(value) == float("inf"):
        return str(value)
    value = float(f"{value:.{digits}g}")
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.{digits}g} {letter}"
    return f"{value:,.0f}" if size >= 10**digits else f"{value:,.{digits}g}"
