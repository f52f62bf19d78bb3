"""What the verbs return besides a model: plain data with ``text(width)`` and ``to_dict()``."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from sparsify.core import Remark
from sparsify.report import Choices, Embeddings, Evidence, Quality, Routing
from sparsify.report_json import encode


@dataclasses.dataclass(frozen=True)
class RegionRow:
    """One region as ``inspect`` shows it."""

    path: str
    kind: str
    facts: dict[str, Any]
    where: str
    block: int | None
    applies: tuple[str, ...]
    refused: tuple[Remark, ...]


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    """The text in lines of at most ``width`` (0 = one line), further ones indented more."""
    if not width:
        return [" " * indent + text]
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the matcher found in a model; nothing was changed."""

    model: str
    kind: str
    nodes: int
    parameters: int
    regions: tuple[RegionRow, ...]
    near_misses: tuple[Remark, ...]
    blocks: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"format": "sparsify-inspection", "format_version": 1, **dataclasses.asdict(self)}

    def text(self, width: int = 100) -> str:
        """Regions of one shape share a line; near misses say which role failed and where."""
        from sparsify.report_groups import collapse

        lines = [
            f"{self.model}: {self.kind}, {self.nodes} operations, {self.parameters:,} parameters",
            "",
        ]
        groups: dict[tuple[Any, ...], list[RegionRow]] = {}
        for row in self.regions:
            shape = (
                row.kind,
                tuple(sorted((k, str(v)) for k, v in row.facts.items())),
                row.applies,
                tuple(r.reason for r in row.refused),
            )
            groups.setdefault(shape, []).append(row)
        for rows in groups.values():
            first = rows[0]
            paths = ", ".join(collapse(r.path for r in rows))
            lines.append(f"{first.kind:<12} {len(rows):>3} x  {paths}")
            facts = ", ".join(f"{k}={v}" for k, v in first.facts.items() if v not in (False, "?"))
            lines += _wrapped(facts, 18, width)
            if first.where:
                lines.append(f"{'':18}--> {first.where}")
            lines += _wrapped(f"applies: {', '.join(first.applies) or 'nothing'}", 18, width)
            for remark in first.refused:
                lines += _wrapped(f"{remark.pass_name} refuses: {remark.reason}", 18, width)
                if remark.suggestion:
                    lines += _wrapped(f"help: {remark.suggestion}", 20, width)
        if not self.regions:
            lines.append("no attention and no feed-forward region was found")
        if self.blocks:
            lines.append("")
            for block in self.blocks:
                lines.append(f"repeated block  {block['count']} x  {block['path']}")
        if self.near_misses:
            lines += ["", "near misses"]
            for miss in self.near_misses:
                lines += _wrapped(f"{miss.region_kind} at {miss.region}: {miss.reason}", 2, width)
                if miss.where:
                    lines.append(f"    --> {miss.where}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line[: max(width, 40)] if width else line for line in lines)


@dataclasses.dataclass(frozen=True)
class Verification:
    """Claims of a saved model, checked again."""

    model: str
    evidence: tuple[Evidence, ...]

    @property
    def ok(self) -> bool:
        """Whether all held."""
        return all(e.ok for e in self.evidence)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format": "sparsify-verification", "format_version": 1, "ok": self.ok,
            **dataclasses.asdict(self),
        }  # fmt: skip

    def text(self, width: int = 100) -> str:
        """One line per check."""
        lines = [f"{self.model}"]
        for e in self.evidence:
            mark = "ok    " if e.ok else "FAILED"
            lines.append(
                f"  {mark} {e.region or 'end to end'}: {e.claim} {e.dtype}, error {e.error:.2e}, "
                f"tolerance {e.tolerance:.2e} (output scale {e.scale:.3g})"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Bisection:
    """Where a pipeline first breaks a claim."""

    pipeline: str
    pass_name: str | None
    region: str | None
    evidence: Evidence | None
    runs: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found broken."""
        return self.pass_name is None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format": "sparsify-bisection", "format_version": 1, "ok": self.ok,
            **dataclasses.asdict(self),
        }  # fmt: skip

    def text(self, width: int = 100) -> str:
        """The culprit in two lines."""
        if self.pass_name is None or self.evidence is None:
            return f"every claim of '{self.pipeline}' holds ({self.runs} runs)"
        e = self.evidence
        return (
            f"{self.pass_name} breaks its claim at {self.region} ({self.runs} runs)\n"
            f"  {e.claim} {e.dtype}: error {e.error:.3g}, tolerance {e.tolerance:.3g}"
        )


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prompt's continuation."""

    prompt: str
    text: str
    tokens: int
    active: float
    seconds: float
    realised: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"format": "sparsify-generation", "format_version": 1, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Quality of a sparse model at several budgets: on text, questions, sentences."""

    model: str
    pipeline: str
    quality: Quality | None = None
    routing: Routing | None = None
    choices: Choices | None = None
    embeddings: Embeddings | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        verdicts = [] if self.quality is None else list(self.quality.verdicts())
        return {
            "format": "sparsify-evaluation", "format_version": 2, **encode(self),
            "verdicts": verdicts,
        }  # fmt: skip

    def text(self, width: int = 100) -> str:
        """A table of each: one row per model and budget."""
        found = (self.quality, self.choices, self.embeddings, self.routing)
        parts = [part.render(width).rstrip() for part in found if part is not None]
        return "\n\n".join([f"{self.model}   {self.pipeline}", *parts])
