"""Tables of what was measured: quality on text, questions and sentences, and routing."""

from __future__ import annotations

from typing import Any

from sparsify.report import Choices, Embeddings, Interval, Quality, Resampled, Routing, number
from sparsify.report_page import Page, percent

FEW = 16  # units of a router that are shown one by one (heads, mostly)
_NAMES = {"static pruning": "static"}  # where columns are few


def quality_table(out: Page, quality: Quality, *, stable: bool) -> None:
    """Next tokens: perplexity, KL and top-1 agreement."""
    out.heading(f"quality on {quality.text}   {quality.tokens:,} tokens")
    rows = [
        ("model", "active", "live", "FLOPs", "perplexity", "to dense", "KL (nats)", "same top-1")
    ]
    for row in quality.rows:
        rows.append((
            *_who(row),
            number(row.perplexity, 3 if stable else 4),
            _number(row.ratio, row.ratio_within, 2 if stable else 3),
            _number(row.kl, row.kl_within, 2 if stable else 3),
            _share(row.top1, row.top1_within),
        ))  # fmt: skip
    out.table(rows)
    _below(out, quality.rows, quality.resampled)
    for verdict in quality.verdicts():
        good = "is better than" in verdict
        out.line(verdict, "good" if good else "bad", label="verdict")


def choices_table(out: Page, choices: Choices, *, stable: bool) -> None:
    """Questions: accuracy and agreement with the dense model."""
    guessing = f"guessing gets {percent(choices.chance)}"
    out.heading(f"choices in {choices.file}   {choices.questions:,} questions, {guessing}")
    rows = [("model", "active", "live", "FLOPs", "accuracy", "to dense", "same choice")]
    for row in choices.rows:
        rows.append((
            *_who(row),
            _share(row.accuracy, row.accuracy_within),
            _share(row.difference, row.difference_within, sign=True),
            _share(row.agreement, row.agreement_within),
        ))  # fmt: skip
    out.table(rows)
    _below(out, choices.rows, choices.resampled)


def embeddings_table(out: Page, found: Embeddings, *, stable: bool) -> None:
    """Sentences: cosine to the dense embedding and shared neighbours."""
    size = f"{found.sentences:,} sentences, {found.tokens:,} tokens"
    out.heading(f"embeddings of {found.text}   {size}")
    top = f"same top-{found.top}"
    rows = [("model", "active", "live", "FLOPs", "cosine to dense", "lowest", top)]
    digits = 3 if stable else 4
    for row in found.rows:
        rows.append((
            *_who(row),
            _number(row.cosine, row.cosine_within, digits),
            f"{row.worst:.{digits}f}",
            _share(row.neighbours, row.neighbours_within),
        ))  # fmt: skip
    out.table(rows)
    pooled = "mean of its tokens" if found.pooling == "mean" else "first token"
    out.line(f"a sentence's embedding is the {pooled}; neighbours among these sentences", "dim")
    _below(out, found.rows, found.resampled)


def _who(row: Any) -> tuple[str, str, str, str]:
    """The first four columns of a row."""
    return (
        _NAMES.get(row.model, row.model),
        percent(row.active),
        "" if row.realised is None else percent(row.realised),
        "" if row.flops is None else percent(row.flops),
    )


def _number(value: float | None, within: Interval | None, digits: int) -> str:
    if value is None:
        return ""
    text = f"{value:.{digits}f}" if value < 100 else number(value)
    if within is None:
        return text
    half = f"{within.half:.{digits}f}" if within.half < 100 else number(within.half)
    return f"{text} ±{half}"


def _share(value: float | None, within: Interval | None, *, sign: bool = False) -> str:
    """A share in percent, with its interval in points."""
    if value is None:
        return ""
    if within is None and not sign:
        return percent(value)
    text = f"{value * 100:+.1f}" if sign else f"{value * 100:.1f}"
    return text if within is None else f"{text} ±{within.half * 100:.1f}{'' if sign else ' %'}"


def _below(out: Page, rows: Any, resampled: Resampled | None) -> None:
    """Notes of the rows, and what the intervals are."""
    for row in rows:
        if row.note:
            out.line(f"{row.model} at {percent(row.active)}: {row.note}", "dim")
    if any(row.flops is not None for row in rows):
        out.line("FLOPs: counted on this text, of the rewritten matrices, routers included", "dim")
    if resampled is not None:
        out.line(resampled.text(), "dim")


def routing_table(out: Page, routing: Routing, *, stable: bool) -> None:
    """What every router did."""
    digits = 2 if stable else 3
    at = f"{routing.tokens:,} tokens at {percent(routing.active)} active"
    out.heading(f"routing on {routing.text}   {at}")

    def text(value: float) -> str:
        return "" if value != value else f"{value:.{digits}f}"

    rows = [("router", "live", "least", "most", "load", "entropy", "SRP", "size", "SCH")]
    for row in routing.rows:
        ends = (percent(min(row.live)), percent(max(row.live)))
        measured = (row.imbalance, row.entropy, row.srp, row.size, row.sch)
        rows.append((row.router, percent(row.live_ratio), *ends, *map(text, measured)))  # type: ignore[arg-type]
    out.table(rows)
    few = [row for row in routing.rows if len(row.live) <= FEW]
    for row in few:
        shares = (f"{n} {percent(v)}" for n, v in zip(row.numbers, row.live, strict=True))
        out.line(f"{row.router}, live by unit: {', '.join(shares)}", "dim")
    out.line(
        "live: of the routed units, all and the least and most used one; load: the most over the "
        "mean; SRP: how well one set "
        f"serves {routing.segment} tokens (F1), size: its units over a token's; SCH: hit rate of a "
        f"cache of {routing.cache:g} times the units in use",
        "dim",
    )
