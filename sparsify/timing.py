"""Interleaved timing: every round runs each of several callables once, in turn.

Two runs one after the other differ by what else the machine does meanwhile; two callables of one
round meet the same conditions. So what is compared is the ratio within each round, and its median
over the rounds. The order rotates, and turns around every other round, so that nobody is always
the one after the same neighbour (whose data lie in the caches, or whose heat slows the clock).
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

LEAST = 2e-3  # seconds of one timed run: a clock tick or an interrupt is below a percent of it


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        call: what is timed.
        prepare: called before it in every round, untimed.
        calls: how often ``call`` runs in one round, one after the other; its time is their mean.
        units: what one call does, for a time per unit (decoded steps, say).
    """

    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    calls: int = 1
    units: int = 1


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median of a sample, and the values that 20 % and 80 % of it stay below."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Of at least one value; between two values of the sample, linear."""
        ordered = sorted(values)
        return Spread(*(_quantile(ordered, q) for q in (0.5, 0.2, 0.8)))


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Seconds per unit of every callable in every round; all have as many rounds."""

    seconds: Mapping[str, tuple[float, ...]]

    def time(self, name: str) -> Spread:
        """Seconds of one unit."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Time of ``name`` over that of ``base`` in the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of(a / b for a, b in pairs)

    def speedup(self, name: str, base: str) -> Spread:
        """How many times as fast as ``base`` ``name`` is, in the same round."""
        return self.ratio(base, name)

    def best(self, names: Iterable[str]) -> str:
        """The name with the least median; the first of equals."""
        return min(names, key=lambda name: self.time(name).median)


def interleaved(
    work: Mapping[str, Work],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> Rounds:
    """Time each piece of ``work`` once a round.

    Args:
        rounds: that count, at least one.
        warmup: rounds before them that do not (lazy work of the first call, cold caches).
        clock: seconds from anywhere, ever larger.
        progress: called with (rounds done, rounds in all).
    """
    if rounds < 1 or not work:
        raise ValueError("timing needs at least one round of at least one callable")
    found: dict[str, list[float]] = {name: [] for name in work}
    enabled = gc.isenabled()
    gc.disable()  # as timeit does: a collection would fall on whoever allocates last
    try:
        for number in range(warmup + rounds):
            for name in turns(list(work), number):
                took = _timed(work[name], clock)
                if number >= warmup:
                    found[name].append(took)
            gc.collect()
            if progress is not None:
                progress(number + 1, warmup + rounds)
    finally:
        if enabled:
            gc.enable()
    return Rounds({name: tuple(times) for name, times in found.items()})


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round ``number``: rotated by one every other round, backwards in odd ones."""
    at = number // 2 % len(names)
    order = [*names[at:], *names[:at]]
    return order[::-1] if number % 2 else order


def enough(
    call: Callable[[], Any],
    *,
    most: int,
    least: float = LEAST,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """How many calls of ``call`` take ``least`` seconds, 1 to ``most``; a first one warms up."""
    call()
    start = clock()
    call()
    took = clock() - start
    return most if took <= 0 else max(1, min(most, math.ceil(least / took)))


def copies(size: int, cache: int, *, times: float = 4.0) -> int:
    """Copies of ``size`` bytes that make ``times`` a cache, so that a visit finds none of its own.

    One layer's weights would stay in the last-level cache from call to call; in a model, all the
    other layers' come in between.
    """
    return max(1, math.ceil(times * cache / max(size, 1)))


def rotated(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Calls the next of ``calls`` every time."""
    order = _around(calls)
    return lambda: next(order)()


def _around(calls: Sequence[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    while True:
        yield from calls


def _timed(work: Work, clock: Callable[[], float]) -> float:
    if work.prepare is not None:
        work.prepare()
    start = clock()
    for _ in range(work.calls):
        work.call()
    return (clock() - start) / (work.calls * work.units)


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
