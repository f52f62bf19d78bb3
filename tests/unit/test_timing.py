"""Interleaved timing, on clocks that only tick when the work says so."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.timing import Rounds, Spread, Work, copies, enough, interleaved, rotated, turns


class Clock:
    """Seconds that pass only in ``spend``; keeps who spent them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, *seconds: float) -> Work:
        """Work that takes the next of ``seconds`` every time."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Work(call)


def test_every_round_runs_each_once_and_the_order_rotates() -> None:
    clock = Clock()
    work = {name: clock.spend(name, 1.0) for name in "abc"}
    found = interleaved(work, 4, warmup=1, clock=clock)
    rounds = ["".join(clock.log[at : at + 3]) for at in range(0, len(clock.log), 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab"]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert found.seconds == {"a": (1.0,) * 4, "b": (1.0,) * 4, "c": (1.0,) * 4}


@given(st.integers(2, 6), st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_no_one_follows_the_same_neighbour_always(count: int, number: int) -> None:
    names = [str(i) for i in range(count)]
    orders = [turns(names, number + i) for i in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)  # each is first some time
    if count > 2:
        before = {o[o.index("0") - 1] for o in orders if o[0] != "0"}
        assert len(before) > 1


def test_warm_up_and_prepare_are_not_counted() -> None:
    clock = Clock()
    slow_at_first = clock.spend("x", 50.0, 2.0)

    def prepare() -> None:
        clock.now += 7.0

    work = {"x": Work(slow_at_first.call, prepare)}
    assert interleaved(work, 3, warmup=1, clock=clock).seconds == {"x": (2.0, 2.0, 2.0)}
    assert clock.now == 50 + 3 * 2 + 4 * 7


def test_several_calls_and_units_are_averaged() -> None:
    clock = Clock()
    work = {"x": Work(clock.spend("x", 1.0, 3.0, 1.0, 3.0).call, calls=2, units=4)}
    assert interleaved(work, 2, warmup=0, clock=clock).seconds == {"x": (0.5, 0.5)}
    assert len(clock.log) == 4


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is ten times slower in some rounds changes medians, not ratios."""
    found = Rounds({"dense": (1.0, 10.0, 1.0, 10.0, 10.0), "half": (0.5, 5.0, 0.5, 5.0, 5.0)})
    assert found.ratio("half", "dense") == Spread(0.5, 0.5, 0.5)
    assert found.speedup("half", "dense") == Spread(2.0, 2.0, 2.0)
    assert found.time("dense") == Spread(10.0, 1.0, 10.0)
    assert found.best(["dense", "half"]) == "half"
    uneven = Rounds({"a": (1.0, 9.0, 2.0), "b": (2.0, 3.0, 1.0)})
    assert uneven.ratio("a", "b").median == 2.0  # of 0.5, 3, 2; the medians' ratio would be 1


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_spread_is_ordered_and_of_the_sample(values: list[float]) -> None:
    found = Spread.of(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert Spread.of(reversed(values)) == found


def test_spread_interpolates() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def test_enough_calls_for_the_clock() -> None:
    clock = Clock()
    call = clock.spend("x", 1e-4).call
    assert enough(call, most=1000, least=2e-3, clock=clock) in (20, 21)
    assert len(clock.log) == 2  # one to warm up, one that counts
    assert enough(call, most=5, least=2e-3, clock=clock) == 5
    assert enough(clock.spend("x", 1.0).call, most=5, clock=clock) == 1
    assert enough(lambda: None, most=7, clock=clock) == 7  # too quick to be seen


def test_copies_fill_the_cache() -> None:
    assert copies(10, 32) == 13
    assert 13 * 10 >= 4 * 32 > 12 * 10
    assert copies(541 << 20, 32 << 20) == 1


def test_rotated_visits_all_in_turn() -> None:
    seen: list[int] = []
    call = rotated([lambda i=i: seen.append(i) for i in range(3)])  # type: ignore[misc]
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_collections_wait_until_the_round_is_over() -> None:
    seen: list[bool] = []
    assert gc.isenabled()
    interleaved({"x": Work(lambda: seen.append(gc.isenabled()))}, 2)
    assert gc.isenabled()
    assert seen == [False, False, False]

    def fails() -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interleaved({"x": Work(fails)}, 1)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="at least one round"):
        interleaved({}, 1)
