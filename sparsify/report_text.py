"""The report as text: on a terminal of any width, in a pipe, and as golden text.

There is one layout; a terminal adds colour. Stable text holds no times, no machine facts and no
measured rounding errors, and rounds what is measured, so that it is the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from sparsify.report import (
    Choices,
    Embeddings,
    Evidence,
    ModelFacts,
    Quality,
    Report,
    Routing,
    Step,
    number,
)
from sparsify.report_groups import RemarkGroup, group_remarks, group_weights
from sparsify.report_page import Page, percent
from sparsify.report_tables import choices_table, embeddings_table, quality_table, routing_table
from sparsify.text import shortened

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
        quality_table(out, report.quality, stable=stable)
    if report.choices is not None:
        choices_table(out, report.choices, stable=stable)
    if report.embeddings is not None:
        embeddings_table(out, report.embeddings, stable=stable)
    if report.routing is not None:
        routing_table(out, report.routing, stable=stable)
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
    at = f" at {percent(report.active)} active" if report.active is not None else ""
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
        f"largest error {number(e.error, 2)} is {percent(e.used)} of the tolerance "
        f"{number(e.tolerance, 2)} ({e.dtype}{place})"
    )


def _model(out: Page, report: Report) -> None:
    at = f"   at {percent(report.active)} active" if report.active is not None else ""
    out.heading(f"whole model{at}")
    out.line(f"{report.dense.nodes:,} nodes before, {report.sparse.nodes:,} after", label="graph")
    _costs(out, report.dense, report.sparse, ("dense", "sparse"), report.context)


def _near_misses(out: Page, report: Report, *, stable: bool) -> None:
    all_remarks = [*report.near_misses, *(r for s in report.steps for r in s.remarks)]
    misses = {(r.region_kind, r.region, r.reason): r for r in all_remarks if r.kind == "near-miss"}
    if not misses:
        return
    out.heading("near misses: looked at, not taken")
    for group in group_remarks(misses.values()):
        _group(out, group, "", stable=stable)


def _ratio(a: float, b: float) -> str:
    return percent(b / a) if a else ""


# ---------------------------------------------------------------------------- where it goes


def render(report: Report, *, width: int = 100, stable: bool = False) -> str:
    """Plain text of ``width`` columns."""
    return page(report, width=width, stable=stable).text()


def render_quality(quality: Quality, *, width: int = 100, stable: bool = False) -> str:
    """Only the quality table, for ``sparsify eval``."""
    return _alone(quality_table, quality, width, stable)


def render_choices(choices: Choices, *, width: int = 100, stable: bool = False) -> str:
    """Only the table of multiple-choice questions, for ``sparsify eval``."""
    return _alone(choices_table, choices, width, stable)


def render_embeddings(found: Embeddings, *, width: int = 100, stable: bool = False) -> str:
    """Only the table of embeddings, for ``sparsify eval``."""
    return _alone(embeddings_table, found, width, stable)


def render_routing(routing: Routing, *, width: int = 100, stable: bool = False) -> str:
    """Only the routing table, for ``sparsify eval``."""
    return _alone(routing_table, routing, width, stable)


def _alone(table: Callable[..., None], found: Any, width: int, stable: bool) -> str:
    out = Page(max(width, 40))
    table(out, found, stable=stable)
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
