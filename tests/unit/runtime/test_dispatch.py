"""Grouping tokens by unit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.runtime.dispatch import LiveRows, plan


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(0, 6),
    units=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    fuse=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_a_plan_covers_exactly_the_live_pairs(
    tokens: int, units: int, density: float, fuse: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    select = torch.rand(tokens, units, generator=g) + 0.5
    select = select * (torch.rand(tokens, units, generator=g) < density)
    work = plan(select, fuse)
    seen = torch.zeros(tokens, units)
    at = 0
    pairs = work.pairs(select)
    for segment, weight in zip(work.segments, pairs, strict=True):
        assert segment.start == at
        at += segment.size
        if not segment.count:
            continue
        rows = torch.arange(tokens) if segment.rows is None else segment.rows
        assert len(rows) == segment.count
        for unit in range(segment.start, at):
            seen[rows, unit] += 1
        assert torch.equal(weight, select[rows][:, segment.start : at])
    assert at == units
    assert torch.equal(seen, (select != 0).float())
    assert work.live == int(seen.sum())
    if not fuse:
        assert all(s.rows is not None for s in work.segments if s.count)
    if fuse and density == 1.0 and tokens:
        assert len(work.segments) == 1


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 4),
    threads=st.integers(1, 3),
    block=st.sampled_from([1, 5]),
    double=st.booleans(),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_live_rows(
    tokens: int, threads: int, block: int, double: bool, density: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    weight = torch.randn(8 * block, 7, generator=g, dtype=dtype)
    x = torch.randn(tokens, 7, generator=g, dtype=dtype)
    mask = torch.rand(tokens, 8, generator=g) < density
    wide = mask.repeat_interleave(block, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        picked = LiveRows.of(x, mask, block)
        dots = picked.dots(weight)
        sums = picked.sums(dots, weight, tokens)
    finally:
        torch.set_num_threads(before)
    want = (x @ weight.t()) * wide
    torch.testing.assert_close(dots, want[wide])
    torch.testing.assert_close(sums, want @ weight)
