"""What a healing gives back: the healed model, its curves, and how evenly its units are used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sparsify.runtime.model import SparseModel

Row = dict[str, Any]
# Heading, key of a row, format and width of the columns; a row may lack the last three.
_COLUMNS = (
    ("perplexity", "perplexity", ".3f", 12),
    ("ratio", "ratio", ".3f", 8),
    ("KL", "kl", ".3f", 8),
    ("live", "live", ".1%", 8),
    ("entropy", "entropy", ".3f", 9),
    ("max load", "imbalance", ".2f", 10),
    ("dead", "dead_units", ".0f", 6),
)


@dataclasses.dataclass(frozen=True)
class Healing:
    """A healed model and how it got there.

    Attributes:
        model: the model that was given, healed in place.
        train: what was trained; trained: how many numbers.
        active: mean budget; text: name of the text.
        improved: whether it got better; where not, the model is as it was.
        start, final: ``perplexity``, ``dense``, ``kl`` (nats), ``live`` on the measuring text;
            where the model has routers also ``entropy`` and ``imbalance`` (means over routers of
            :mod:`sparsify.runtime.metrics`), ``dead_units`` (routed units that no token used, over
            all routers) and ``routers``: the same per router, with each unit's ``load``.
        best_step: after which the kept weights came.
        steps: a row per step: loss parts, gradient norm, budget, live share, learning rate factor.
        evaluations: a row per evaluation: what ``start`` holds, ``step`` and ``cpu_seconds``.
        seconds, cpu_seconds: wall and processor time, over all processes of a resumed healing.
        stopped: why it ended: ``steps``, ``minutes`` or ``no better``.
    """

    model: SparseModel
    train: str
    trained: int
    active: float
    text: str
    improved: bool
    start: Row
    final: Row
    best_step: int
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    seconds: float
    cpu_seconds: float
    stopped: str

    @property
    def closed(self) -> float:
        """Share of the gap in perplexity to the dense model that was closed on this text."""
        gap = float(self.start["perplexity"] - self.start["dense"])
        won = float(self.start["perplexity"] - self.final["perplexity"])
        return won / gap if gap > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the model."""
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"
        }
        return {
            "format": "sparsify-healing", "format_version": 2, **plain, "closed": self.closed,
        }  # fmt: skip

    def summary(self) -> str:
        """One line."""
        if not self.improved:
            return f"healing ({self.train}) did not improve the model, which is as it was"
        a, b = self.start, self.final
        return (
            f"healed ({self.train}, {self.trained:,} numbers, {self.best_step} steps on "
            f"{self.text}): perplexity {a['perplexity']:.2f} -> {b['perplexity']:.2f}, dense "
            f"{a['dense']:.2f}; {self.closed:.0%} of the gap closed at {b['live']:.1%} live"
        )

    def text_table(self, width: int = 100) -> str:
        """The evaluations as a table, the least even routers, and the summary."""
        rows = [*self.evaluations, {"step": math.nan, **self.final}]
        shown = [c for c in _COLUMNS if c[1] == "ratio" or any(c[1] in row for row in rows)]
        lines = [f"{'step':>6}" + "".join(f"{head:>{wide}}" for head, _, _, wide in shown)]
        for row in rows:
            step = "final" if row is rows[-1] else f"{row['step']:.0f}"
            cells = {**row, "ratio": row["perplexity"] / row["dense"]}
            lines.append(
                f"{step:>6}"
                + "".join(
                    f"{format(cells[key], how) if key in cells else '-':>{wide}}"
                    for _, key, how, wide in shown
                )
            )
        took = f"{self.seconds / 60:.1f} minutes ({self.cpu_seconds / 60:.1f} of CPU)"
        lines += [
            "",
            *self._uneven(width),
            self.summary(),
            f"took {took}; ended by: {self.stopped}",
        ]
        return "\n".join(lines)

    def _uneven(self, width: int) -> list[str]:
        """The router with the most dead units, of those the one with the least entropy."""
        routers: dict[str, Row] = self.final.get("routers", {})
        worst = min(
            routers.items(), key=lambda item: (-item[1]["dead"], item[1]["entropy"]), default=None
        )
        if worst is None:
            return []
        path, row = worst
        line = (
            f"least even: {path}, entropy {row['entropy']:.3f}, "
            f"{row['dead']} of {len(row['load'])} units dead"
        )
        return [line if len(line) <= width else line[: width - 3] + "..."]
