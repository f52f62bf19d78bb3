"""A page of text: labels at the left, tables, everything wrapped to a width."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

_LABEL = 10  # columns of the labels at the left


@dataclasses.dataclass
class Page:
    """Lines of text, each with a style name, wrapped to ``width``."""

    width: int
    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def line(self, text: str = "", style: str = "", *, label: str = "") -> None:
        """``label`` in the left column, ``text`` beside it, wrapped with a hanging indent."""
        lead = " " * _LABEL
        for at, piece in enumerate(self._wrap(text, self.width - _LABEL)):
            start = f"{label:<{_LABEL}}" if at == 0 else lead
            self.lines.append(((start + piece).rstrip(), style))

    def full(self, text: str = "", style: str = "") -> None:
        """``text`` from the left edge."""
        for piece in self._wrap(text, self.width):
            self.lines.append((piece, style))

    def heading(self, text: str) -> None:
        """A blank line and a heading."""
        self.full()
        self.full(text, "heading")

    def table(self, rows: Sequence[Sequence[str]], *, label: str = "") -> None:
        """The first row is the header; numbers align right; a narrow page gets one line a cell."""
        keep = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
        rows = [[row[i] for i in keep] for row in rows]
        sizes = [max(len(row[i]) for row in rows) for i in range(len(keep))]
        if sum(sizes) + 2 * len(sizes) > self.width - _LABEL:
            for row in rows[1:]:
                pairs = zip(rows[0][1:], row[1:], strict=True)
                self.line(row[0], label=label)
                self.line("  " + ", ".join(f"{head} {cell}" for head, cell in pairs if cell))
                label = ""
            return
        for at, row in enumerate(rows):
            cells = [f"{row[0]:<{sizes[0]}}"]
            cells += [f"{c:>{n}}" for c, n in zip(row[1:], sizes[1:], strict=True)]
            start = f"{label if at == 0 else '':<{_LABEL}}"
            self.lines.append(((start + "  ".join(cells)).rstrip(), "dim" if at == 0 else ""))

    @staticmethod
    def _wrap(text: str, width: int) -> list[str]:
        indent = text[: len(text) - len(text.lstrip())]
        return textwrap.wrap(
            text, max(width, 20), subsequent_indent=indent, break_on_hyphens=False
        ) or [""]

    def text(self) -> str:
        """All lines, without styles, with a final newline."""
        return "\n".join(line for line, _ in self.lines).strip("\n") + "\n"


def percent(fraction: float | None) -> str:
    if fraction is None:
        return ""
    text = f"{fraction * 100:.1f}".removesuffix(".0")
    return "<0.1 %" if text == "0" and fraction > 0 else f"{text} %"
