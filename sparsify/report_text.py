"""The report as text: on a terminal of any width, in a pipe, and as golden text.

There is one layout; a terminal adds colour. Stable text holds no times, no machine facts and no
measured rounding errors, and rounds what is measured, so that it is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from sparsify.report import Evidence, ModelFacts, Quality, Report, Routing, Step, number
from sparsify.report_groups import RemarkGroup, group_remarks, group_weights
from sparsify.text import shortened

_LABEL = 10  # columns of the labels at the left
FEW = 16  # units of a router that are shown one by one (heads, mostly)


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


# ---------------------------------------------------------------------------- the parts


def page(report: Report, *, width: int = 100, stable: bool = False) -> Page:
    """The laid out report."""
    out = Page(max(width, 40))
    name = "sparsify" if stable else f"sparsify {report.version}"
    out.full(f"{name}   {report.model}   {report.dtype}", "title")
    out.line(shortened(report.pipeline), label="pipeline")
    if report.calibration:
        out.line(f"fitted on {report.calibration}", label="data")
    _headline(out, report)
    for note in report.notes:
        out.line(note, "warn", label="note")
    for at, step in enumerate(report.steps, 1):
        _step(out, step, at, stable=stable, context=report.context)
    if [(step.before, step.after) for step in report.steps] != [(report.dense, report.sparse)]:
        _model(out, report)  # a lone pass has said it all
    if report.end_to_end is not None and report.end_to_end not in _checks(report):
        _evidence(out, (report.end_to_end,), stable=stable)
    if report.quality is not None:
        _quality(out, report.quality, stable=stable)
    if report.routing is not None:
        _routing(out, report.routing, stable=stable)
    _near_misses(out, report, stable=stable)
    if not stable and report.seconds:
        spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.seconds.items())
        out.full()
        out.line(spent, "dim", label="time")
        facts = ", ".join(f"{k} {v}" for k, v in report.machine.items() if v not in (None, ""))
        if facts:
            out.line(facts, "dim", label="machine")
    return out


def _headline(out: Page, report: Report) -> None:
    regions = sum(step.count("applied") + step.count("left") for step in report.steps)
    changed = sum(step.count("applied") for step in report.steps)
    checks = _checks(report)
    if report.end_to_end is not None and report.end_to_end not in checks:
        checks.append(report.end_to_end)
    failed = sum(not e.ok for e in checks)
    held = "no claim was checked" if not checks else "all claims hold"
    if failed:
        held = f"{failed} of {len(checks)} CHECKS FAILED"
    ratio = _ratio(report.dense.flops_per_token, report.sparse.flops_per_token)
    at = f" at {_percent(report.active)} active" if report.active is not None else ""
    out.line(
        f"{changed} of {regions} regions changed; {held}; {ratio} of the dense FLOPs per token{at}",
        "bad" if failed else "good" if checks else "warn",
        label="result",
    )


def _checks(report: Report) -> list[Evidence]:
    return [e for step in report.steps for e in step.evidence]


def _step(out: Page, step: Step, at: int, *, stable: bool, context: int) -> None:
    out.heading(f"{at}. {shortened(step.options)}   claims {step.claim}")
    label = {"applied": "changed", "left": "left"}
    for group in group_remarks(r for r in step.remarks if r.kind != "near-miss"):
        _group(out, group, label[group.kind], stable=stable)
    if not any(r.kind != "near-miss" for r in step.remarks):
        out.line("no region of this kind in the model", "warn", label="left")
    out.line(f"{step.nodes_before:,} nodes before, {step.nodes_after:,} after", label="graph")
    name = "weights"
    for moved in group_weights(step.weights):
        times = f"   ({moved.count})" if moved.count > 1 else ""
        out.line(f"{moved.dense} -> {moved.sparse}   {moved.how}{times}", label=name)
        name = ""
    if step.before is not None and step.after is not None:
        _costs(out, step.before, step.after, ("before", "after"), context)
    _evidence(out, step.evidence, stable=stable)


def _group(out: Page, group: RemarkGroup, label: str, *, stable: bool) -> None:
    count = f"   {group.count} regions" if group.count > 1 else ""
    style = {"applied": "good", "left": "warn"}.get(group.kind, "dim")
    out.line(f"{', '.join(group.paths)}{count}   {group.region_kind}", style, label=label)
    if group.reason:
        out.line("  " + group.reason)
    if group.kind != "applied" and group.where:
        # line numbers of a model's source move with its library's version
        where = re.sub(r"\.py:\d+", ".py", group.where) if stable else group.where
        out.line("  at " + where.removeprefix("--> "), "dim")
    if group.suggestion:
        out.line("  help: " + group.suggestion)


def _costs(out: Page, a: ModelFacts, b: ModelFacts, names: tuple[str, str], context: int) -> None:
    rows = [("", *names, "ratio")]
    values: list[tuple[str, float, float]] = [
        ("parameters", a.parameters, b.parameters),
        ("weight bytes", a.parameter_bytes, b.parameter_bytes),
        ("FLOPs per token", a.flops_per_token, b.flops_per_token),
    ]
    for kind in dict.fromkeys((*a.by_kind, *b.by_kind)):
        one, two = a.by_kind.get(kind, 0.0), b.by_kind.get(kind, 0.0)
        if one or two:
            values.append((f"  in {kind}", one, two))
    values.append(("bytes per token", a.bytes_per_token, b.bytes_per_token))
    rows += [(name, number(x, 4), number(y, 4), _ratio(x, y)) for name, x, y in values]
    out.table(rows, label="cost")
    out.line(f"per token at a context of {context:,}; bytes: weights read to decode one", "dim")


def _evidence(out: Page, evidence: Sequence[Evidence], *, stable: bool) -> None:
    label = "evidence"
    for scope, words in (("region", "region by region"), ("end-to-end", "end to end")):
        checks = [e for e in evidence if e.scope == scope]
        if not checks:
            continue
        worst = max(checks, key=lambda e: (not e.ok, e.used))
        held = sum(e.ok for e in checks)
        count = f" in {held} of {len(checks)}" if scope == "region" else ""
        verb = "holds" if worst.ok else "FAILS"
        text = f"{worst.claim} {verb} {words}{count}: {_error(worst, stable)}"
        out.line(text, "good" if worst.ok else "bad", label=label)
        label = ""


def _error(e: Evidence, stable: bool) -> str:
    if e.error == 0:
        return f"no difference ({e.dtype})"
    if stable and e.ok and e.tolerance != float("inf"):
        return f"within the tolerance ({e.dtype})"
    place = f", {e.region}" if e.region else ""
    if e.tolerance == float("inf"):
        size = number(e.error, 1 if stable else 3)
        return f"error {size} at scale {number(e.scale)}, measured, not bounded ({e.dtype}{place})"
    if e.tolerance == 0:
        return f"largest error {number(e.error)} where none is allowed ({e.dtype}{place})"
    return (
        f"largest error {number(e.error, 2)} is {_percent(e.used)} of the tolerance "
        f"{number(e.tolerance, 2)} ({e.dtype}{place})"
    )


def _model(out: Page, report: Report) -> None:
    at = f"   at {_percent(report.active)} active" if report.active is not None else ""
    out.heading(f"whole model{at}")
    out.line(f"{report.dense.nodes:,} nodes before, {report.sparse.nodes:,} after", label="graph")
    _costs(out, report.dense, report.sparse, ("dense", "sparse"), report.context)


def _quality(out: Page, quality: Quality, *, stable: bool) -> None:
    digits = 3 if stable else 4
    out.heading(f"quality on {quality.text}   {quality.tokens:,} tokens")
    rows = [("model", "active", "realised", "perplexity", "to dense", "KL (nats)", "same top-1")]
    for row in quality.rows:
        rows.append((
            row.model,
            _percent(row.active),
            "" if row.realised is None else _percent(row.realised),
            number(row.perplexity, digits),
            f"{row.ratio:.2f}" if stable else f"{row.ratio:.3f}",
            "" if row.kl is None else f"{row.kl:.2f}" if stable else f"{row.kl:.4f}",
            "" if row.top1 is None else _percent(row.top1),
        ))  # fmt: skip
    out.table(rows, label="")
    for row in quality.rows:
        if row.note:
            out.line(f"{row.model} at {_percent(row.active)}: {row.note}", "dim")
    for verdict in quality.verdicts():
        good = "is better than static" in verdict
        out.line(verdict, "good" if good else "bad", label="verdict")


def _routing(out: Page, routing: Routing, *, stable: bool) -> None:
    digits = 2 if stable else 3
    at = f"{routing.tokens:,} tokens at {_percent(routing.active)} active"
    out.heading(f"routing on {routing.text}   {at}")

    def text(value: float) -> str:
        return "" if value != value else f"{value:.{digits}f}"

    rows = [("router", "live", "least", "most", "load", "entropy", "SRP", "size", "SCH")]
    for row in routing.rows:
        ends = (_percent(min(row.live)), _percent(max(row.live)))
        measured = (row.imbalance, row.entropy, row.srp, row.size, row.sch)
        rows.append((row.router, _percent(row.live_ratio), *ends, *map(text, measured)))  # type: ignore[arg-type]
    out.table(rows)
    few = [row for row in routing.rows if len(row.live) <= FEW]
    for row in few:
        shares = (f"{n} {_percent(v)}" for n, v in zip(row.numbers, row.live, strict=True))
        out.line(f"{row.router}, live by unit: {', '.join(shares)}", "dim")
    out.line(
        "live: of the routed units, all and the least and most used one; load: the most over the "
        "mean; SRP: how well one set "
        f"serves {routing.segment} tokens (F1), size: its units over a token's; SCH: hit rate of a "
        f"cache of {routing.cache:g} times the units in use",
        "dim",
    )


def _near_misses(out: Page, report: Report, *, stable: bool) -> None:
    all_remarks = [*report.near_misses, *(r for s in report.steps for r in s.remarks)]
    misses = {(r.region_kind, r.region, r.reason): r for r in all_remarks if r.kind == "near-miss"}
    if not misses:
        return
    out.heading("near misses: looked at, not taken")
    for group in group_remarks(misses.values()):
        _group(out, group, "", stable=stable)


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return ""
    text = f"{fraction * 100:.1f}".removesuffix(".0")
    return "<0.1 %" if text == "0" and fraction > 0 else f"{text} %"


def _ratio(a: float, b: float) -> str:
    return _percent(b / a) if a else ""


# ---------------------------------------------------------------------------- where it goes


def render(report: Report, *, width: int = 100, stable: bool = False) -> str:
    """Plain text of ``width`` columns."""
    return page(report, width=width, stable=stable).text()


def render_quality(quality: Quality, *, width: int = 100, stable: bool = False) -> str:
    """Only the quality table, for ``sparsify eval``."""
    out = Page(max(width, 40))
    _quality(out, quality, stable=stable)
    return out.text()


def render_routing(routing: Routing, *, width: int = 100, stable: bool = False) -> str:
    """Only the routing table, for ``sparsify eval``."""
    out = Page(max(width, 40))
    _routing(out, routing, stable=stable)
    return out.text()


STYLES = {
    "title": "bold", "heading": "bold cyan", "good": "green", "bad": "bold red",
    "warn": "yellow", "dim": "dim", "": "",
}  # fmt: skip


def show(report: Report, console: Any = None) -> None:
    """Print to a rich console (a new one on standard output if None)."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    for line, style in page(report, width=console.width).lines:
        console.print(Text(line, style=STYLES[style]), soft_wrap=True)
