"""Counters of work: what a routed module was asked for and what it really multiplied.

``rows`` is counted on the line that issues the matmul, not where the selection is made: tests hold
the two against each other, so "skipped" means skipped.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass
class Counter:
    """Work of one routed module since the last reset.

    Attributes:
        tokens: tokens seen (for attention: query positions).
        units_total: tokens x units.
        units_live: token-unit pairs that the selection keeps.
        rows: token-unit pairs that were multiplied.
        rows_dense: token-unit pairs that the dense module would have multiplied.
    """

    tokens: int = 0
    units_total: int = 0
    units_live: int = 0
    rows: int = 0
    rows_dense: int = 0

    def reset(self) -> None:
        """Back to zero."""
        self.tokens = self.units_total = self.units_live = self.rows = self.rows_dense = 0

    def seen(self, tokens: int, units: int, live: int) -> None:
        """One call: ``tokens`` tokens, of whose ``tokens * units`` pairs ``live`` are live."""
        self.tokens += tokens
        self.units_total += tokens * units
        self.rows_dense += tokens * units
        self.units_live += live

    def computed(self, tokens: int, units: int, live: int) -> None:
        """The same, where exactly the live pairs were multiplied."""
        pairs = tokens * units
        self.tokens += tokens
        self.units_total += pairs
        self.rows_dense += pairs
        self.units_live += live
        self.rows += live

    @property
    def live_fraction(self) -> float:
        """Live share of all token-unit pairs seen; NaN before the first token."""
        return self.units_live / self.units_total if self.units_total else float("nan")


def counters(model: nn.Module) -> list[tuple[str, Counter]]:
    """(path, counter) of every routed module in ``model``, in module order."""
    found = []
    for path, module in model.named_modules():
        counter = getattr(module, "counter", None)
        if isinstance(counter, Counter) and getattr(type(module), "counts", True):
            found.append((path, counter))
    return found


def realised(model: nn.Module) -> dict[str, float]:
    """path -> live fraction, for the routed modules that have run since the last reset."""
    return {path: c.live_fraction for path, c in counters(model) if c.units_total}


def reset(model: nn.Module) -> None:
    """Set every counter of ``model`` to zero."""
    for _, counter in counters(model):
        counter.reset()
