"""The dial over a whole model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.counters import counters, realised, reset
from sparsify.runtime.dial import routers, set_active
from sparsify.runtime.router import Router
from tests.unit.runtime.examples import Dense


def stack(
    layers: int, experts: int, *, shared: int = 0, hidden: int = 24, rule: str = "top-k"
) -> nn.Sequential:
    """Routed layers, calibrated on random rows where the rule needs it."""
    blocks = []
    for seed in range(layers):
        dense = Dense(experts=experts, shared=shared, hidden=hidden, seed=seed, dtype=torch.float32)
        module = dense.routed()
        module.router.rule = rule  # type: ignore[assignment]
        module.router.calibrate(torch.randn(2000, 12))
        module.pass_name = "ffn-moe"
        blocks.append(module)
    return nn.Sequential(*blocks)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 12),
    experts=st.sampled_from([3, 6, 8]),
    shared=st.integers(0, 1),
    active=st.floats(0.35, 1.0),
)
def test_rounding_is_spread_over_layers(
    layers: int, experts: int, shared: int, active: float
) -> None:
    model = stack(layers, experts, shared=shared)
    set_active(model, active)
    x = torch.randn(5, 12)
    for block in model:
        block(x)
    mean = sum(realised(model).values()) / layers
    assert abs(mean - active) <= 0.5 / (experts * layers) + 1e-6
    assert all(c.rows == c.units_live for _, c in counters(model))
    reset(model)
    assert realised(model) == {}


def test_half_of_an_odd_number_of_units() -> None:
    model = stack(10, 3)
    set_active(model, 0.5)
    assert {r.budget for _, r in routers(model)} == {1, 2}


def test_thresholds_meet_the_budget() -> None:
    model = stack(4, 8, rule="threshold", shared=2)
    x = torch.randn(4000, 12)
    for active in (0.3, 0.5, 0.9, 1.0):
        set_active(model, active)
        reset(model)
        for block in model:
            block(x)
        for value in realised(model).values():
            assert abs(value - active) < 0.02
    assert all(value == 1 for value in realised(model).values())


def test_budgets_go_where_dead_units_cost_most() -> None:
    torch.manual_seed(0)
    model = stack(4, 8, rule="threshold")
    for i, (_, router) in enumerate(routers(model)):
        x = torch.randn(4000, 12)
        router.calibrate(x, router.scores(x).exp() * 2**i)  # later layers lose more
    set_active(model, 0.5)
    live = []
    for block in model:
        block(torch.randn(4000, 12))
    live = list(realised(model).values())
    assert live == sorted(live)
    assert live[0] < live[-1]
    assert abs(sum(live) / 4 - 0.5) < 0.02
    # at the optimum one more dead unit costs the same in every layer: score + i log 2 at the cut
    prices = [router.threshold + i * math.log(2) for i, (_, router) in enumerate(routers(model))]
    assert max(prices) - min(prices) < 0.5  # a table has 65 points


def test_one_is_the_dense_model() -> None:
    model = stack(3, 6)
    x = torch.randn(5, 12)
    before = model(x)
    set_active(model, 0.5)
    assert not torch.allclose(model(x), before)
    set_active(model, 1)
    assert torch.equal(model(x), before)


def test_places_and_passes() -> None:
    other = stack(1, 6)
    model = nn.ModuleDict({"layers": stack(4, 6), "other": other})
    (single,) = other
    single.pass_name = "other"  # type: ignore[assignment]
    set_active(model, 0.5, at="layers.[1-2]")
    budgets = {path: r.active for path, r in routers(model)}
    assert [budgets[f"layers.{i}.router"] for i in range(4)] == [1, 0.5, 0.5, 1]
    set_active(model, 0.25, pass_name="other")
    assert [path for path, r in routers(model) if r.active == 0.25] == ["other.0.router"]
    for bad in ({"at": "nowhere"}, {"pass_name": "none"}):
        with pytest.raises(BadInput, match="nothing to set"):
            set_active(model, 0.5, **bad)
    with pytest.raises(BadInput, match="not a budget"):
        set_active(model, 0)


def test_shared_units_above_the_budget_say_so_once() -> None:
    model = stack(3, 6, shared=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_active(model, 0.2)
    (warning,) = caught
    assert "4 of 6 units" in str(warning.message)
    model(torch.randn(5, 12))
    assert {round(v, 6) for v in realised(model).values()} == {round(4 / 6, 6)}


def test_a_router_alone() -> None:
    assert set_active(Router(torch.randn(4, 8)), 0.5) == {"": 0.5}


def test_passes_do_not_share_a_budget() -> None:
    """Two passes whose routers lie inside modules: units of one are no currency of the other."""
    model = stack(4, 6, rule="threshold")
    for number, block in enumerate(model):
        block.router.errors = torch.linspace(0, 1, 65).square() * (1 + 99 * (number // 2))
        block.pass_name = ("ffn-moe", "ffn-moe", "other", "other")[number]
    budgets = list(set_active(model, 0.5).values())
    assert sum(budgets[:2]) / 2 == pytest.approx(0.5, abs=0.02)
    assert sum(budgets[2:]) / 2 == pytest.approx(0.5, abs=0.02)
