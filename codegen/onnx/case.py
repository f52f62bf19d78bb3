"""What comparing a file with its model finds, call by call."""

from __future__ import annotations

import dataclasses

RELATIVE = 1e-4  # of the largest output, in float32


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of the file's selections with the model's, in one call.

    Attributes:
        decisions: whether a unit is live for a token; differ: how many are not the model's.
        untied: selections among which some differ by more than a tie (scores within
            :data:`RELATIVE` of the largest, as outputs may differ).
        relative: error of the outputs where the model is given the file's selections; None where
            none differ.
    """

    decisions: int
    differ: int
    untied: tuple[str, ...] = ()
    relative: float | None = None

    @property
    def same(self) -> float:
        """Share of the decisions."""
        return 1 - self.differ / self.decisions

    @property
    def ties(self) -> bool:
        """Whether what differs is ties, and explains the difference of the outputs."""
        close = self.relative is not None and self.relative <= RELATIVE
        return close and not self.untied

    def text(self) -> str:
        """A few words."""
        if not self.differ:
            return "same selection"
        what = f"{self.differ:,} of {self.decisions:,} selections differ"
        if self.relative is None:
            return what
        where = f", not at a tie in {self.untied[0]}" if self.untied else " at ties"
        return f"{what}{where}; {self.relative:.1e} with the file's"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: example, prefill, decode, ...
        error: largest absolute difference of any output; scale: largest absolute value of that one.
        same: share of positions whose likeliest token is the same (causal models), else None.
        selection: how its selections agree with the model's; None where there are none, and where
            the file is held against another.
        against: what the file is held against, where that is not the model itself; held: whether
            :data:`RELATIVE` is asked of it, or it is told only (what rounded weights cost).
    """

    name: str
    error: float
    scale: float
    same: float | None = None
    selection: Agreement | None = None
    against: str = "model"
    held: bool = True

    @property
    def relative(self) -> float:
        """Of the output's scale."""
        return relative(self.error, self.scale)

    @property
    def ok(self) -> bool:
        """Within :data:`RELATIVE`, where that is asked; or so with the file's own selections, which
        differ from the model's at ties only."""
        ties = self.selection is not None and self.selection.ties
        return not self.held or self.relative <= RELATIVE or ties

    def text(self) -> str:
        """One line."""
        agree = "" if self.same is None else f", same token {self.same:.1%}"
        if self.selection is not None:
            agree += f", {self.selection.text()}"
        word = ("ok " if self.ok else "BAD") if self.held else "   "
        beside = "" if self.against == "model" else f" ({self.against})"
        return f"{word} {self.name:<13} relative error {self.relative:.1e}{agree}{beside}"


def relative(error: float, scale: float) -> float:
    """An absolute error as a share of what it is an error of."""
    return error / max(scale, 1e-30)
