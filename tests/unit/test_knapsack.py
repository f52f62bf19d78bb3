"""The multiple-choice knapsack against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.knapsack import Choice, Front

Groups = list[list[tuple[int, int]]]
GROUPS = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def brute(groups: Groups, budget: float) -> float | None:
    """The least loss within the budget, of all combinations."""
    sums = [
        (sum(c for c, _ in pick), sum(loss for _, loss in pick))
        for pick in itertools.product(*groups)
    ]
    return min((loss for cost, loss in sums if cost <= budget), default=None)


def made(groups: Groups) -> list[list[Choice]]:
    return [[Choice(float(c), float(loss)) for c, loss in group] for group in groups]


def worth(groups: Groups, chosen: tuple[int, ...]) -> tuple[int, int]:
    pairs = [group[at] for group, at in zip(groups, chosen, strict=True)]
    return sum(c for c, _ in pairs), sum(loss for _, loss in pairs)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 60))
def test_whole_costs_are_solved_to_the_optimum(groups: Groups, budget: int) -> None:
    front = Front(made(groups))
    front = Front(made(groups), steps=max(round(front.most - front.least), 1))
    chosen = front.best(budget)
    if chosen is None:
        assert brute(groups, budget) is None
        return
    cost, loss = worth(groups, chosen)
    assert cost <= budget
    assert loss == brute(groups, budget)


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.floats(0, 60))
def test_any_budget_is_kept_and_nearly_optimal(groups: Groups, budget: float) -> None:
    front = Front(made(groups), steps=97)
    chosen = front.best(budget)
    if chosen is None:
        assert brute(groups, budget) is None
        return
    cost, loss = worth(groups, chosen)
    bound = brute(groups, budget - len(groups) * front.step)
    assert cost <= budget + 1e-6
    assert bound is None or loss <= bound


def test_more_budget_never_loses_more() -> None:
    groups = [[(c * (g + 1), (8 - c) ** 2 * (5 - g)) for c in range(9)] for g in range(5)]
    front = Front(made(groups))
    losses = []
    for budget in range(0, 121, 3):
        chosen = front.best(budget)
        assert chosen is not None
        losses.append(worth(groups, chosen)[1])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_too_small_a_budget_has_no_answer() -> None:
    front = Front([[Choice(2.0, 1.0), Choice(3.0, 0.0)], [Choice(1.0, 0.0)]])
    assert front.best(2.9) is None
    assert front.best(3.0) == (0, 0)
    assert front.best(99) == (1, 0)
    assert (front.least, front.most) == pytest.approx((3, 4))
