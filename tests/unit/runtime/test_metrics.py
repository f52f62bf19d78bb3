"""What routers do on a text: hand values, and brute force over all segment routers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.metrics import Loads, entropy, facts, segment_cache, segment_routing
from sparsify.runtime.router import Router


def column(text: str) -> Tensor:
    """One unit's live tokens."""
    return torch.tensor([[c == "x"] for c in text])


def test_units_that_stay_live_are_served_perfectly() -> None:
    mask = torch.zeros(20, 4, dtype=torch.bool)
    mask[:, :2] = True
    assert segment_routing([mask], 4) == (1.0, 1.0)
    assert segment_cache([mask], 4, 1.0) == pytest.approx(38 / 40)  # two misses at the start


def test_segment_routing_by_hand() -> None:
    # segments of 2 of "xx..x": xx x. .. .x hold 2 1 0 1 live tokens, 4 in all
    score, size = segment_routing([column("xx..x")], 2)
    # alpha 1: 2*4/(2*3 + 4) = 0.8; alpha 2: 2*2/(2*1 + 4) = 0.67
    assert score == pytest.approx(0.8)
    assert size == pytest.approx(6 / 4)


def test_sequences_do_not_join_in_segments() -> None:
    two = segment_routing([column("xx"), column("..")], 2)
    assert two == (1.0, 1.0)
    assert all(math.isnan(v) for v in segment_routing([column("x"), column("x")], 2))
    score, size = segment_routing([column("....")], 2)
    assert score == 0 and math.isnan(size)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=3, max_size=5),
    segment=st.integers(1, 3),
)
def test_no_segment_router_is_better(rows: list[list[bool]], segment: int) -> None:
    mask = torch.tensor(rows)
    pairs = [
        int(mask[p : p + segment, unit].sum())
        for unit in range(2)
        for p in range(len(rows) - segment + 1)
    ]
    total = sum(pairs)
    best = 0.0
    for taken in itertools.product((0, 1), repeat=len(pairs)):
        below = segment * sum(taken) + total
        hits = sum(f for f, on in zip(pairs, taken, strict=True) if on)
        best = max(best, 2 * hits / below if below else 0.0)
    assert segment_routing([mask], segment)[0] == pytest.approx(best)


def test_cache_by_hand() -> None:
    # one unit a token: 0 1 0 2 0; a cache of 2 evicts what the next 2 tokens use least
    mask = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 2, 0]), 3).bool()
    # t0 miss {0}; t1 miss {0,1}; t2 hit; t3 miss, 0 is used soon and 1 is not: {0,2}; t4 hit
    assert segment_cache([mask], 2, 2.0) == pytest.approx(2 / 5)
    # a cache of 1 holds the last unit only, and no two neighbours agree
    assert segment_cache([mask], 2, 1.0) == 0
    assert segment_cache([mask], 2, 3.0) == pytest.approx(2 / 5)  # all fit: first uses miss


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(1, 3))
def test_a_larger_cache_of_everything_hits_all_but_first_uses(seed: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    best = torch.rand(12, 6, generator=g).topk(k).indices
    mask = torch.zeros(12, 6, dtype=torch.bool).scatter(1, best, True)
    first = int(mask.any(0).sum())
    assert segment_cache([mask], 4, 6 / k) == pytest.approx(1 - first / (12 * k))


def test_entropy_and_load() -> None:
    assert entropy(torch.ones(8)) == pytest.approx(1)
    assert entropy(torch.tensor([1.0, 0, 0, 0])) == 0
    assert entropy(torch.tensor([1.0, 1, 0, 0])) == pytest.approx(0.5)
    assert math.isnan(entropy(torch.zeros(3)))
    found = facts([torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 0], [1, 0]])], segment=2)
    assert found.tokens == 4
    assert found.live == (1.0, 0.25)
    assert found.live_ratio == pytest.approx(0.625)
    assert found.imbalance == pytest.approx(1.6)
    with pytest.raises(BadInput, match="no token"):
        facts([])


# ---------------------------------------------------------------------------- while it trains


def test_loads_add_up_over_calls_as_facts_of_all_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(7, generator=g)
    routers = torch.nn.ModuleDict(
        {
            "plain": Router(torch.randn(5, 4, generator=g), shared=2, active=0.5),
            "ordered": Router(torch.randn(5, 4, generator=g), shared=2, active=0.6, order=order),
        }
    )
    loads, masks = Loads(routers), {name: [] for name in routers}
    for _ in range(3):
        x = torch.randn(2, 3, 4, generator=g)
        with loads:
            selects = {name: router(x) for name, router in routers.items()}
        for name, router in routers.items():
            router(x)  # outside: not counted
            shared = list(range(2)) if router.order is None else router.order[:2].tolist()
            rest = [unit for unit in range(7) if unit not in shared]
            masks[name].append(selects[name].flatten(0, 1)[:, rest] != 0)
    found = loads.balance()
    assert loads.tokens == {"plain": 18, "ordered": 18}
    for name in routers:
        wanted, row = facts(masks[name]), found["routers"][name]
        assert row["load"] == pytest.approx(wanted.live, abs=1e-4)
        assert row["entropy"] == pytest.approx(wanted.entropy)
        assert row["imbalance"] == pytest.approx(wanted.imbalance)
        assert row["dead"] == sum(share == 0 for share in wanted.live)
    assert found["dead_units"] == sum(row["dead"] for row in found["routers"].values())


def test_loads_know_dead_units_and_nothing_without_tokens() -> None:
    router = Router(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), active=0.5)
    loads = Loads(router)
    assert loads.balance() == {}
    with loads:
        router(torch.ones(6, 1))
    found = loads.balance()
    assert found["routers"][""]["load"] == [1.0, 1.0, 0.0, 0.0]
    assert found["dead_units"] == 2
    assert found["imbalance"] == pytest.approx(2.0)
    assert found["entropy"] == pytest.approx(0.5)
