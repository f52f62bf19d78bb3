"""The report: what was changed, what it costs, what proves it, and what it does to quality.

Plain frozen data. The pipeline fills it; terminal, HTML, JSON and golden text are views of it, so
no view knows more than another. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from sparsify.core import Moved, Remark
from sparsify.report_quality import (
    ChoiceRow,
    Choices,
    EmbeddingRow,
    Embeddings,
    Interval,
    Quality,
    QualityRow,
    Resampled,
    Who,
    number,
)

__all__ = [
    "FORMAT", "FORMAT_VERSION", "SCOPES", "ChoiceRow", "Choices", "EmbeddingRow", "Embeddings",
    "Evidence", "Interval", "ModelFacts", "Quality", "QualityRow", "Report", "Resampled", "Routing",
    "RoutingRow", "Scope", "Step", "Who", "number",
]  # fmt: skip

FORMAT = "sparsify-report"
FORMAT_VERSION = 1

Scope = Literal["region", "end-to-end"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Size and cost of one model (or of the model between two passes).

    Attributes:
        nodes: nodes of the graph.
        parameters: numbers in all weights; parameter_bytes: their bytes.
        flops_per_token: two per multiply-add, matmuls only, at the active budget.
        bytes_per_token: weight bytes read when one token is decoded alone, at the active budget.
        by_kind: FLOPs per token by region kind (``FeedForward``, ``Attention``, ``other``).
    """

    nodes: int
    parameters: int
    parameter_bytes: int
    flops_per_token: float
    bytes_per_token: float
    by_kind: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One check of a claim at the dense limit.

    Attributes:
        scope: one ``region`` on dense activations, or the whole model ``end-to-end``.
        region: its path; empty end to end.
        claim: the claim's text, e.g. ``REORDERED``.
        dtype: that the comparison ran in.
        error: largest absolute difference; scale: largest absolute expected value.
        tolerance: largest error that the claim allows (infinite for APPROXIMATE).
        ok: whether the claim held.
    """

    scope: Scope
    region: str
    claim: str
    dtype: str
    error: float
    scale: float
    tolerance: float
    ok: bool

    @property
    def used(self) -> float:
        """Error as a fraction of the tolerance; 0 where both are 0."""
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.tolerance


@dataclasses.dataclass(frozen=True)
class Step:
    """What one pass of the pipeline did.

    ``options`` is the canonical text of the stage; ``before`` and ``after`` are the model's facts
    around it, ``after`` at the pass's own active budget.
    """

    pass_name: str
    options: str
    claim: str
    remarks: tuple[Remark, ...]
    nodes_before: int
    nodes_after: int
    parameters_before: int
    parameters_after: int
    before: ModelFacts | None = None
    after: ModelFacts | None = None
    weights: tuple[Moved, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    seconds: float = 0.0

    def count(self, kind: str) -> int:
        """How many remarks are of ``kind`` (applied, left, near-miss)."""
        return sum(remark.kind == kind for remark in self.remarks)

    @property
    def worst(self) -> Evidence | None:
        """The check that came closest to its tolerance, or broke it by most."""
        return max(self.evidence, key=lambda e: (not e.ok, e.used), default=None)


@dataclasses.dataclass(frozen=True)
class RoutingRow:
    """What one router did on a text; see :mod:`sparsify.runtime.metrics`.

    Attributes:
        router: its path; rule: how it selects.
        units: all; shared: those always live, left out of the rest.
        active: its budget; live_ratio: live share of (token, routed unit) pairs.
        numbers: the routed units (experts, heads), ascending; live: that share for each of them.
        entropy: of the loads, relative to even ones; imbalance: the largest load over the mean.
        srp: segment routing best performance; size: units its segment router takes over the
            router's; sch: segment cache best hit rate. NaN where sequences are too short.
    """

    router: str
    rule: str
    units: int
    shared: int
    active: float
    live_ratio: float
    numbers: tuple[int, ...]
    live: tuple[float, ...]
    entropy: float
    imbalance: float
    srp: float
    size: float
    sch: float


@dataclasses.dataclass(frozen=True)
class Routing:
    """Rows measured on one text of ``tokens`` tokens, in segments of ``segment`` tokens.

    ``active`` is the model's budget; ``cache`` the size of the cache over the units in use.
    """

    text: str
    tokens: int
    active: float
    segment: int
    cache: float
    rows: tuple[RoutingRow, ...]

    def render(self, width: int = 100, *, stable: bool = False) -> str:
        """The table as plain text."""
        from sparsify.report_text import render_routing

        return render_routing(self, width=width, stable=stable)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a reader may want to know about one compilation.

    Attributes:
        version: of sparsify.
        model: as the user named it.
        pipeline: its canonical text.
        active: the model-wide budget, or None where passes set their own.
        dtype: of the weights.
        seconds: stage (capture, match, calibrate, pass names) -> wall time.
        machine: processor, versions: what timings depend on.
        dense, sparse: the model before and after all passes.
        steps: one per pass, in order.
        near_misses: candidates that the matcher did not take.
        end_to_end: the check of the whole model.
        quality, choices, embeddings: on texts, questions and sentences, where they were measured.
        routing: what the routers did on a text, if that was measured.
        context: keys per token that attention's cost counts.
        calibration: the text that routers were fitted on, or None.
        notes: warnings and fallbacks; never empty where something was done differently than asked.
    """

    version: str
    model: str
    pipeline: str
    active: float | None
    dtype: str
    seconds: dict[str, float]
    machine: dict[str, Any]
    dense: ModelFacts
    sparse: ModelFacts
    steps: tuple[Step, ...]
    near_misses: tuple[Remark, ...] = ()
    end_to_end: Evidence | None = None
    quality: Quality | None = None
    context: int = 512
    calibration: str | None = None
    notes: tuple[str, ...] = ()
    routing: Routing | None = None
    choices: Choices | None = None
    embeddings: Embeddings | None = None

    @property
    def ok(self) -> bool:
        """Whether every claim that was checked held."""
        checks = [e for step in self.steps for e in step.evidence]
        return all(e.ok for e in (*checks, *((self.end_to_end,) if self.end_to_end else ())))

    # -- views

    def text(self, width: int = 100, *, stable: bool = False) -> str:
        """Plain text for ``width`` columns; ``stable`` leaves out times, machine and noise."""
        from sparsify.report_text import render

        return render(self, width=width, stable=stable)

    def golden(self) -> str:
        """The stable text that golden files hold."""
        return self.text(100, stable=True)

    def print(self, console: Any = None) -> None:
        """Show it on a terminal, in colour where the terminal has it (``NO_COLOR`` is heeded)."""
        from sparsify.report_text import show

        show(self, console)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, by ``report.schema.json``."""
        from sparsify.report_json import encode

        return {"format": FORMAT, "format_version": FORMAT_VERSION, **encode(self)}

    def to_json(self) -> str:
        """Strict JSON text with a final newline."""
        import json

        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, value: Any) -> Report:
        """The report in ``value``.

        Raises:
            BadInput: it is no report, or of a version that this sparsify does not know.
        """
        from sparsify.report_json import report_from

        return report_from(value)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote; raises BadInput."""
        from sparsify.report_json import parse

        return cls.from_dict(parse(text))

    @staticmethod
    def diff(a: Report, b: Report) -> Any:
        """Two reports side by side: a :class:`sparsify.report_diff.ReportDiff`."""
        from sparsify.report_diff import diff

        return diff(a, b)
