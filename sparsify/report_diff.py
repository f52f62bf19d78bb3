"""Two reports side by side: options, regions, costs, evidence, quality."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from sparsify.report import Report, number
from sparsify.report_groups import collapse
from sparsify.report_page import Page

Section = Literal["options", "regions", "cost", "evidence", "quality"]
Cell = str | float | None


@dataclasses.dataclass(frozen=True)
class DiffRow:
    """One thing that both reports speak of; None where a report does not."""

    section: Section
    what: str
    a: Cell
    b: Cell

    @property
    def same(self) -> bool:
        """Whether both reports say the same."""
        return self.a == self.b

    @property
    def ratio(self) -> float | None:
        """b / a where both are numbers."""
        numbers = isinstance(self.a, int | float) and isinstance(self.b, int | float)
        return self.b / self.a if numbers and self.a else None  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class ReportDiff:
    """All rows, the equal ones too; ``names`` are what A and B are called."""

    names: tuple[str, str]
    rows: tuple[DiffRow, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return all(row.same for row in self.rows)

    def changes(self) -> tuple[DiffRow, ...]:
        """Only the rows that differ."""
        return tuple(row for row in self.rows if not row.same)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [
            {**dataclasses.asdict(row), "same": row.same, "ratio": row.ratio} for row in self.rows
        ]
        return {"a": self.names[0], "b": self.names[1], "same": self.same, "rows": rows}

    def text(self, width: int = 100, *, everything: bool = False) -> str:
        """Tables of what differs, section by section (of all rows with ``everything``)."""
        out = Page(max(width, 40))
        out.line(self.names[0], "title", label="A")
        out.line(self.names[1], "title", label="B")
        shown = self.rows if everything else self.changes()
        if not shown:
            out.full("no difference in options, regions, costs, evidence or quality")
        for section in dict.fromkeys(row.section for row in shown):
            out.heading(section)
            rows = [("", "A", "B", "B / A")]
            for row in (r for r in shown if r.section == section):
                ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
                rows.append((row.what, _cell(row.a), _cell(row.b), ratio))
            out.table(rows)
        return out.text()


def diff(a: Report, b: Report, names: tuple[str, str] | None = None) -> ReportDiff:
    """Compare two reports; their machines and times are left out."""
    rows: list[DiffRow] = []
    for section, read in (
        ("options", _options), ("regions", _regions), ("cost", _cost), ("evidence", _evidence),
        ("quality", _quality),
    ):  # fmt: skip
        left, right = read(a), read(b)
        for what in dict.fromkeys((*left, *right)):
            rows.append(DiffRow(section, what, left.get(what), right.get(what)))  # type: ignore[arg-type]
    return ReportDiff(names or _names(a, b), tuple(rows))


def _names(a: Report, b: Report) -> tuple[str, str]:
    return f"{a.model}  {a.pipeline}", f"{b.model}  {b.pipeline}"


_PAIR = re.compile(r"(\S+?)=(\"(?:[^\"\\]|\\.)*\"|\S+)")


def _options(report: Report) -> dict[str, Cell]:
    cells: dict[str, Cell] = {
        "model": report.model, "dtype": report.dtype, "active": report.active,
        "calibration": report.calibration, "passes": ", ".join(s.pass_name for s in report.steps),
    }  # fmt: skip
    seen: dict[str, int] = {}
    for step in report.steps:
        seen[step.pass_name] = seen.get(step.pass_name, 0) + 1
        again = f" ({seen[step.pass_name]})" if seen[step.pass_name] > 1 else ""
        inner = step.options.partition("{")[2].removesuffix("}")
        for key, value in _PAIR.findall(inner):
            cells[f"{step.pass_name}{again} {key}"] = value
    return cells


def _regions(report: Report) -> dict[str, Cell]:
    """Per pass: how many were changed, and the outcome of every region, runs of layers as one."""
    cells: dict[str, Cell] = {}
    for step in report.steps:
        cells[f"{step.pass_name}: changed"] = float(step.count("applied"))
        cells[f"{step.pass_name}: left dense"] = float(step.count("left"))
        left: dict[str, list[str]] = {}
        for remark in step.remarks:
            if remark.kind == "left":
                left.setdefault(remark.reason, []).append(remark.region)
        for reason, paths in left.items():
            cells[f"{step.pass_name}: {reason}"] = ", ".join(collapse(paths))
    return cells


def _cost(report: Report) -> dict[str, Cell]:
    facts = report.sparse
    return {
        "nodes": float(facts.nodes),
        "parameters": float(facts.parameters),
        "weight bytes": float(facts.parameter_bytes),
        "FLOPs per token": facts.flops_per_token,
        **{f"FLOPs in {kind}": flops for kind, flops in facts.by_kind.items()},
        "bytes per token": facts.bytes_per_token,
    }


def _evidence(report: Report) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for step in report.steps:
        if step.evidence:
            held = sum(e.ok for e in step.evidence)
            cells[f"{step.pass_name}: {step.claim}"] = f"holds in {held} of {len(step.evidence)}"
    if report.end_to_end is not None:
        held_text = "holds" if report.end_to_end.ok else "FAILS"
        cells["end to end"] = f"{report.end_to_end.claim} {held_text}"
    return cells


def _quality(report: Report) -> dict[str, Cell]:
    if report.quality is None:
        return _others(report)
    on = report.quality.text
    cells: dict[str, Cell] = {}
    for row in report.quality.rows:
        name = f"{row.model} {row.active:.0%} on {on}"
        cells[f"{name}: perplexity"] = row.perplexity
        if row.kl is not None:
            cells[f"{name}: KL"] = row.kl
    return cells | _others(report)


def _others(report: Report) -> dict[str, Cell]:
    """Quality on questions and sentences."""
    cells: dict[str, Cell] = {}
    if report.choices is not None:
        for asked in report.choices.rows:
            name = f"{asked.model} {asked.active:.0%} on {report.choices.file}"
            cells[f"{name}: accuracy"] = asked.accuracy
    if report.embeddings is not None:
        for row in report.embeddings.rows:
            name = f"{row.model} {row.active:.0%} on {report.embeddings.text}"
            cells[f"{name}: cosine"] = row.cosine
    return cells


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else number(value, 4)
