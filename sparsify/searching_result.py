"""What a search found: the setting, what it was compared with, and the Pareto front."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify.report import number
from sparsify.report_json import encode
from sparsify.searching_goal import Target

if TYPE_CHECKING:
    from sparsify.runtime.model import SparseModel
    from sparsify.searching_units import Setting


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting that was measured.

    Attributes:
        name: where it comes from.
        reached: what it costs, as the target says it (a share of the dense cost, or a speed), by
            the units that were really live on the text; set: the same by the budgets.
        kl: nats a token, and its standard error; ratio: of perplexities to the dense model's.
        predicted: KL by the sum over units; None where it was not solved for.
        pipeline: the text that makes it; empty where only the numbers are kept.
    """

    name: str
    reached: float
    set: float
    kl: float
    error: float
    ratio: float
    predicted: float | None = None
    pipeline: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One unit: its level in the setting that was found, and what it costs in quality.

    Attributes:
        pass_name, regions: what was turned.
        active: budget of each region.
        saved: share of the dense cost that the level saves.
        kl: level -> measured KL of this unit alone, all else dense.
    """

    pass_name: str
    regions: tuple[str, ...]
    active: tuple[float, ...]
    saved: float
    kl: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Search:
    """A search's result.

    Attributes:
        model, passes, target, text, tokens: what was searched, and on which text.
        found: the best setting; ``pipeline`` of it reproduces it with the same calibration, seed.
        tried: all settings that were measured at the target, the found one among them.
        front: solved (and measured) for other targets, dearest first; ``even`` the same targets
            with one budget for all.
        units: in the order of the graph.
        measurements: runs of the text.
        sparse: the model that was searched, its dials where the found setting has them.
        settings: name of what was tried -> budgets of the routers of ``sparse``.
    """

    model: str
    passes: str
    target: Target
    text: str
    tokens: int
    found: Candidate
    tried: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    even: tuple[Candidate, ...]
    units: tuple[Row, ...]
    measurements: int
    calibration: str
    seed: int
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sparse: SparseModel | None = dataclasses.field(default=None, compare=False, repr=False)
    settings: Mapping[str, Setting] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def pipeline(self) -> str:
        """The text that reproduces the found setting."""
        return self.found.pipeline

    def headline(self) -> str:
        """What was found, in one line."""
        kind, one = self.target.kind, self.found
        return (
            f"sparsify search {self.model} --target {self.target}: {kind} {one.reached:.3f}, KL "
            f"{one.kl:.4f} nats a token, perplexity x {number(one.ratio, 4)} on {self.text}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the model is not among them."""
        found = encode(dataclasses.replace(self, sparse=None, settings={}))
        del found["sparse"], found["settings"]
        return {"format": "sparsify-search", "format_version": 1, **found}

    def text_table(self, width: int = 100) -> str:
        """The settings at the target, the front, and the most telling units."""
        what = "speed" if self.target.kind == "speed" else f"{self.target.kind}, share of dense"
        lines = [
            f"{self.model}   {self.passes}   target {self.target}",
            f"text {self.text}, {self.tokens:,} predicted tokens, {self.measurements} measurements",
            "",
            _row("setting", "cost", "by budget", "KL", "+-", "perplexity"),
        ]
        lines += [_candidate(c, " <- found" * (c is self.found)) for c in self.tried]
        lines += ["", f"front ({what})", _row("", "cost", "by budget", "KL", "+-", "perplexity")]
        for one, even in zip(self.front, self.even, strict=True):
            lines.append(_candidate(one, f"  evenly: {even.kl:.4f}, x {even.ratio:.3f}"))
        lines += ["", "units that lose most and least for what their level saves"]
        for row in _telling(self.units):
            budget = ", ".join(f"{a:g}" for a in row.active)
            kl = ", ".join(f"{k}: {v:.2g}" for k, v in row.kl.items())
            text = f"{row.pass_name} {_short(row.regions)}: active {budget}; alone, KL at {kl}"
            lines += textwrap.wrap(
                text, max(width, 40), initial_indent="  ", subsequent_indent="    "
            )
        for note in self.notes:
            lines += textwrap.wrap(f"note: {note}", max(width, 40), subsequent_indent="  ")
        took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in self.seconds.items())
        return "\n".join([*lines, f"time: {took}"])


def _row(*cells: str) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>11}" for cell in cells[1:])


def _candidate(one: Candidate, note: str = "") -> str:
    cells = (f"{one.reached:.3f}", f"{one.set:.3f}", f"{one.kl:.4f}", f"{one.error:.4f}")
    return (_row(one.name, *cells, f"x {number(one.ratio, 4)}") + note).rstrip()


def _telling(rows: Sequence[Row], count: int = 3) -> list[Row]:
    """The units with the lowest and the highest budgets."""
    ordered = sorted(rows, key=lambda row: (sum(row.active) / len(row.active), row.regions))
    if len(ordered) <= 2 * count:
        return list(rows)
    return [*ordered[-count:][::-1], *ordered[:count]]


def _short(paths: Sequence[str]) -> str:
    """``a.b.[c, d]`` of ``a.b.c`` and ``a.b.d``."""
    head = paths[0].rpartition(".")[0]
    if len(paths) > 1 and all(p.rpartition(".")[0] == head for p in paths):
        return f"{head}.[{', '.join(p.rpartition('.')[2] for p in paths)}]"
    return ", ".join(paths)
