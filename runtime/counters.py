"""Counters of work: what a routed module was asked for and what it really multiplied.

``rows`` is counted on the line that issues the matmul, not where the selection is made: tests hold
the two against each other, so "skipped" means skipped.
"""

from __future__ import annotations

import dataclasses
from array import array
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class _Number:
    """One of a counter's numbers."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __get__(self, counter: Any, kind: Any = None) -> int:
        number: int = counter.numbers[self.place]
        return number

    def __set__(self, counter: Any, value: int) -> None:
        counter.numbers[self.place] = value


@dataclasses.dataclass
class Counter:
    """Work of one routed module since the last reset.

    Attributes:
        tokens: tokens seen (for attention: query positions).
        units_total: tokens x units.
        units_live: token-unit pairs that the selection keeps.
        rows: token-unit pairs that were multiplied.
        rows_dense: token-unit pairs that the dense module would have multiplied.
        numbers: the five, as int64 in this order: kernels add to them where they lie.
    """

    numbers: array[int] = dataclasses.field(default_factory=lambda: array("q", [0] * 5))

    tokens = _Number(0)
    units_total = _Number(1)
    units_live = _Number(2)
    rows = _Number(3)
    rows_dense = _Number(4)

    def __copy__(self) -> Any:
        return dataclasses.replace(self, numbers=self.numbers[:])

    def reset(self) -> None:
        """Back to zero."""
        for place in range(len(self.numbers)):
            self.numbers[place] = 0

    def seen(self, tokens: int, units: int, live: int) -> None:
        """One call: ``tokens`` tokens, of whose ``tokens * units`` pairs ``live`` are live."""
        numbers, pairs = self.numbers, tokens * units
        numbers[0] += tokens
        numbers[1] += pairs
        numbers[2] += live
        numbers[4] += pairs

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
