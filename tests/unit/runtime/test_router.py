"""Selections: budgets, ties, weights of one, gradients, thresholds."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import BadInput
from sparsify.runtime.budget import check_active
from sparsify.runtime.router import Router
from sparsify.runtime.spec import from_spec


def router(routed: int = 6, shared: int = 2, width: int = 8, **options: object) -> Router:
    g = torch.Generator().manual_seed(routed + shared)
    weight = torch.randn(routed, width, generator=g)
    return Router(weight, torch.randn(routed, generator=g), shared=shared, **options)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(
    routed=st.integers(1, 12),
    shared=st.integers(0, 4),
    active=st.floats(0.01, 1.0),
    tokens=st.integers(0, 6),
    grad=st.booleans(),
)
def test_top_k_keeps_the_budget(
    routed: int, shared: int, active: float, tokens: int, grad: bool
) -> None:
    module = router(routed, shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.set_active(active)
    units = routed + shared
    with torch.set_grad_enabled(grad):
        select = module(torch.randn(tokens, 3, 8))
    assert select.shape == (tokens, 3, units)
    assert ((select == 0) | (select == 1)).all()
    assert (select[..., :shared] == 1).all()
    want = min(max(math.floor(active * units - shared + 0.5), 0 if shared else 1), routed)
    assert ((select[..., shared:] != 0).sum(-1) == want).all()
    if tokens:
        scores = module.scores(torch.zeros(8))  # the best are kept
        kept = module.live(scores)
        if 0 < want < routed:
            assert scores[kept].min() >= scores[~kept].max()


def test_ties_go_to_the_lower_unit() -> None:
    module = Router(torch.zeros(64, 8), active=0.5)
    select = module(torch.randn(5, 8))
    assert (select[:, :32] == 1).all()
    assert (select[:, 32:] == 0).all()


def test_weights_are_exactly_one_and_carry_gradients() -> None:
    module = router(active=0.5)
    x = torch.randn(50, 8) * 20
    select = module(x)
    assert select.requires_grad
    assert set(select.detach().unique().tolist()) == {0.0, 1.0}
    select.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0


def test_dead_units_have_no_gradient() -> None:
    module = Router(torch.zeros(4, 8), torch.tensor([3.0, 2.0, 1.0, 0.0]), active=0.5)
    module(torch.randn(3, 8)).sum().backward()
    assert module.bias.grad is not None
    assert (module.bias.grad[:2] > 0).all()
    assert (module.bias.grad[2:] == 0).all()


@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_one_means_everything(rule: str) -> None:
    module = router(rule=rule)
    assert module.all_live
    x = torch.full((3, 8), torch.nan)
    assert (module(x) == 1).all()
    with torch.no_grad():
        assert (module(x) == 1).all()


@pytest.mark.parametrize("rule", ["top-k", "threshold", "softmax-top-k"])
def test_bad_numbers_do_not_crash(rule: str) -> None:
    module = router(shared=0, rule=rule)
    module.calibrate(torch.randn(100, 8))
    module.set_active(0.5)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert module(torch.full((2, 8), value)).shape == (2, 6)


@settings(max_examples=25, deadline=None)
@given(active=st.floats(0.3, 0.99), seed=st.integers(0, 99))
def test_threshold_meets_the_budget_on_average(active: float, seed: int) -> None:
    module = router(16, 4, rule="threshold")
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 8, generator=g)
    module.calibrate(x)
    module.set_active(active)
    live = (module(x) != 0).float().mean().item()
    assert abs(live - active) < 0.003
    assert (module(x)[:, :4] == 1).all()


def test_threshold_varies_with_the_token() -> None:
    module = router(16, 4, rule="threshold")
    x = torch.randn(400, 8)
    module.calibrate(x)
    module.set_active(0.5)
    assert (module(x) != 0).sum(-1).unique().numel() > 3


def test_more_budget_never_drops_a_unit() -> None:
    module = router(16, 4, rule="threshold")
    x = torch.randn(100, 8)
    module.calibrate(x, points=9)
    before = torch.zeros(100, 20, dtype=torch.bool)
    for active in (0.25, 0.3, 0.5, 0.7, 0.99, 1.0):
        module.set_active(active)
        now = module(x) != 0
        assert (now | ~before).all()
        before = now


def test_threshold_needs_calibration() -> None:
    module = router(rule="threshold")
    with pytest.raises(BadInput, match="calibrated"):
        module.set_active(0.5)


def test_softmax_weights_sum_to_one() -> None:
    module = router(shared=0, rule="softmax-top-k", active=0.5)
    select = module(torch.randn(9, 8))
    torch.testing.assert_close(select.sum(-1), torch.ones(9))
    assert ((select != 0).sum(-1) == 3).all()
    assert not module.all_live
    with pytest.raises(BadInput, match="shared"):
        router(shared=1, rule="softmax-top-k")


def test_order_places_units() -> None:
    plain = router(4, 2, active=0.5)
    order = torch.tensor([5, 1, 0, 2, 3, 4])
    placed = Router(plain.weight.detach(), plain.bias.detach(), shared=2, active=0.5, order=order)
    x = torch.randn(7, 8)
    assert torch.equal(placed(x)[:, order], plain(x))
    assert (placed(x)[:, [5, 1]] == 1).all()
    with pytest.raises(BadInput, match="order"):
        Router(plain.weight.detach(), order=order)


def test_budget_below_the_shared_units() -> None:
    module = router(6, 4)
    with pytest.warns(UserWarning, match="4 of 10 units"):
        module.set_active(0.2)
    assert ((module(torch.randn(3, 8)) != 0).sum(-1) == 4).all()


@pytest.mark.parametrize("active", [0, -0.5, 1.01, float("nan"), float("inf"), True, "0.5", None])
def test_budgets_out_of_range(active: object) -> None:
    with pytest.raises(BadInput, match="not a budget"):
        check_active(active)  # type: ignore[arg-type]


def test_unknown_rule() -> None:
    with pytest.raises(BadInput, match="no routing rule"):
        router(rule="best")


def test_half_models_keep_their_thresholds() -> None:
    module = router(16, 4, rule="threshold")
    x = torch.randn(200, 8)
    module.calibrate(x)
    module.set_active(0.5)
    cut = module.threshold
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.quantiles is not None
    assert half.quantiles.dtype == torch.float32
    assert half.threshold == cut
    agree = (half(x.bfloat16()) != 0) == (module(x) != 0)
    assert agree.float().mean() > 0.97


def test_spec_round_trip() -> None:
    module = router(6, 2, rule="threshold", errors=torch.linspace(0, 1, 5), order=torch.arange(8))
    x = torch.randn(50, 8)
    module.calibrate(x, points=33)
    module.set_active(0.5)
    other = from_spec(module.spec())
    assert isinstance(other, Router)
    assert other.threshold is not None  # read off the empty table; loading must forget it
    other.load_state_dict(module.state_dict())
    assert other.spec() == module.spec()
    assert torch.equal(other(x), module(x))


def test_frozen_stays_frozen() -> None:
    frozen = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    assert not Router(frozen).weight.requires_grad
    assert Router(torch.randn(3, 4)).weight.requires_grad
