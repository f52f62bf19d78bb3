"""Intervals: pairs share their resamples, texts are drawn whole, seeds repeat."""

from __future__ import annotations

import numpy as np
import pytest

from sparsify.bootstrap import FEWEST, Bootstrap


def test_sums_are_of_the_drawn_groups() -> None:
    rows = np.arange(60.0)
    drawn = Bootstrap([i // 2 for i in range(60)], resamples=300)
    assert drawn.count == 30
    sums = drawn.sums(np.stack([rows, np.ones(60)], axis=1))
    assert (sums[:, 1] == 60).all()  # every group has two rows
    assert sums[:, 0].mean() == pytest.approx(rows.sum(), rel=0.05)
    again = Bootstrap([i // 2 for i in range(60)], resamples=300)
    np.testing.assert_array_equal(sums, again.sums(np.stack([rows, np.ones(60)], axis=1)))


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    found = Bootstrap(range(400), resamples=2000).mean(values)
    assert found is not None
    error = values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_pairs_are_closer_than_their_members() -> None:
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 1, size=200)  # how hard a text is, for both models
    mine, dense = hard + 0.1, hard + draw.normal(0, 0.01, size=200)
    drawn = Bootstrap(range(200))
    apart, alone = drawn.mean(mine - dense), drawn.mean(mine)
    assert apart is not None and alone is not None
    assert apart.half < alone.half / 20
    sums = drawn.sums(np.stack([mine, dense], axis=1))
    within = drawn.within((sums[:, 0] - sums[:, 1]) / 200)
    assert within is not None
    assert (within.low, within.high) == pytest.approx((apart.low, apart.high))


def test_few_texts_are_drawn_by_sequence() -> None:
    few = Bootstrap([i % (FEWEST - 1) for i in range(50)])
    assert (few.count, few.unit) == (50, "sequences")
    enough = Bootstrap([i % FEWEST for i in range(50)])
    assert (enough.count, enough.unit) == (FEWEST, "texts")
    facts = enough.facts
    assert facts is not None and "1,000 resamples of 20 texts" in facts.text()


def test_one_sequence_has_no_interval() -> None:
    for drawn in (Bootstrap([0]), Bootstrap([]), Bootstrap(range(30), resamples=0)):
        assert not drawn.possible
        assert drawn.facts is None
        assert drawn.mean([1.0]) is None


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(40, 3))
    monkeypatch.setattr("sparsify.bootstrap._AT_ONCE", 40 * 7)
    small = Bootstrap(range(40), resamples=50).sums(values)
    assert small.shape == (50, 3)
    assert small.mean() == pytest.approx(values.sum() / 3, abs=2.0)
