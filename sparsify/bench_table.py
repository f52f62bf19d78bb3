"""What ``bench`` finds: rows of times, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsify.report_json import encode
from sparsify.report_page import Page
from sparsify.timing import Spread

DECODED = 8  # tokens at most that count as decoding so many sequences; more are a prefill of one

_HEAD = ("", "active", "live", "ms", "p20-p80", "tokens/s", "speedup", "ideal", "of ideal")


@dataclasses.dataclass(frozen=True)
class Regime:
    """How the model is run.

    Attributes:
        batch: sequences at once; tokens: new ones of each; context: those in the cache before.
        own: the model's own example, whose sizes are not ours to choose.
    """

    batch: int
    tokens: int
    context: int = 0
    own: bool = False

    @staticmethod
    def of(tokens: int, context: int) -> Regime:
        """Up to ``DECODED`` tokens are decoded, one a sequence; more are one prefill."""
        return Regime(tokens, 1, context) if tokens <= DECODED else Regime(1, tokens)

    @property
    def decodes(self) -> bool:
        return self.context > 0

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.own:
            return f"prefill of the example, {self.batch * self.tokens:,} tokens"
        if not self.decodes:
            return f"prefill of {self.tokens:,} tokens"
        if self.batch == 1:
            return f"decode, one token after {self.context:,}"
        return f"small batch: decode {self.batch} sequences, one token each after {self.context:,}"


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One model in one regime; times in seconds of one step (decode) or of the prefill.

    Attributes:
        regime: its name. tokens: that one step computes, over all sequences.
        model: dense, dense compiled, routed eager or routed lowered.
        active: the budget; None for the dense model. realised: share of units that was live.
        speedup: over the base, the median of the ratios within rounds.
        ideal: the speedup that is possible, by Amdahl; None for the dense model.
        counted: dense over routed bytes (decode) or operations (prefill).
        base: whether the others are compared with this one.
        note: what is to be known about this row.
    """

    regime: str
    tokens: int
    model: str
    active: float | None
    realised: float | None
    seconds: Spread
    speedup: Spread
    ideal: float | None
    base: bool = False
    note: str = ""
    counted: float | None = None

    @property
    def of_ideal(self) -> float | None:
        return None if self.ideal is None else self.speedup.median / self.ideal


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What ``sparsify bench`` found."""

    model: str
    pipeline: str
    rows: tuple[BenchRow, ...]
    rounds: int
    notes: tuple[str, ...] = ()
    date: str = ""
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [{**encode(row), "of_ideal": row.of_ideal} for row in self.rows]
        return {"format": "sparsify-bench", "format_version": 1, **encode(self), "rows": rows}

    def text(self, width: int = 100) -> str:
        """A table per regime, and the notes."""
        page = Page(max(width, 40))
        page.full(f"{self.model}   {self.pipeline}", "title")
        for regime in dict.fromkeys(row.regime for row in self.rows):
            page.heading(regime)
            table: list[tuple[str, ...]] = [_HEAD]
            rows = [row for row in self.rows if row.regime == regime]
            table += [_cells(row) for row in rows]
            page.table(table)
            base = next((row.model for row in rows if row.base), "")
            page.line(f"speedup over '{base}', median of {self.rounds} interleaved rounds", "dim")
        page.full()
        said = [f"{row.model}: {row.note}" for row in self.rows if row.note]
        for note in dict.fromkeys((*self.notes, *said)):
            page.line(note, "warn", label="note")
        shown = ", ".join(f"{k} {v}" for k, v in self.machine.items() if v not in (None, ""))
        page.line(f"{self.date}; {shown}", "dim", label="machine")
        return page.text()


def _cells(row: BenchRow) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    ms = row.seconds
    return (
        row.model,
        percent(row.active),
        percent(row.realised),
        _ms(ms.median),
        f"{_ms(ms.low)}-{_ms(ms.high)}",
        f"{row.tokens / ms.median:,.0f}",
        f"{row.speedup.median:.2f}",
        "" if row.ideal is None else f"{row.ideal:.2f}",
        percent(row.of_ideal),
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"
