"""Masked training, thresholds that follow their scores, schedules and LoRA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime import lora
from sparsify.runtime.budget import Rule
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router
from sparsify.runtime.schedule import Schedule
from sparsify.runtime.training import Thresholds, masked, resettle
from tests.unit.runtime.examples import SILU


def layer(rule: Rule = "top-k", active: float = 0.5) -> RoutedFFN:
    """8 experts of 3 neurons, 2 shared, stand-ins, everything trains, float64."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    router = Router(normal(6, 5), normal(6), shared=2, rule=rule)
    router.calibrate(normal(256, 5))
    module = RoutedFFN(
        normal(8, 3, 5), normal(8, 3, 5), normal(8, 3, 5), None, None, normal(5),
        activation=SILU, router=router, dropped=normal(8, 5), slopes=normal(6, 5),
    )  # fmt: skip
    module.requires_grad_(True)
    router.set_active(active)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_masked_has_the_values_and_gradients_of_grouped(rule: Rule) -> None:
    found = []
    for dispatch in ("grouped", "masked"):
        module = layer(rule)
        module.dispatch = dispatch  # type: ignore[assignment]
        x = draw(11, 5).requires_grad_(True)
        y = module(x)
        y.square().sum().backward()
        found.append((y, x.grad, {n: p.grad for n, p in module.named_parameters()}))
        assert module.counter.rows == (88 if dispatch == "masked" else module.counter.units_live)
        assert module.counter.units_live < 88
    (y, gx, mine), (y2, gx2, theirs) = found
    torch.testing.assert_close(y2, y)
    torch.testing.assert_close(gx2, gx)
    for name, gradient in mine.items():
        torch.testing.assert_close(theirs[name], gradient, msg=name)


@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_gradients_of_masked_experts_and_stand_ins_are_those_of_finite_differences(
    rule: Rule,
) -> None:
    module = layer(rule)
    x = draw(4, 5)  # its own gradient is straight-through where it is routed by
    names = ["up", "gate", "down", "down_bias", "dropped", "slopes"]
    values = [getattr(module, name).detach().requires_grad_(True) for name in names]

    def run(*given: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, given, strict=True)), x)
        return result

    with masked(module):
        assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_straight_through_keeps_values_and_teaches_dead_units(rule: Rule) -> None:
    module = layer(rule)
    module.slopes = None  # stand-ins teach dead units in another way
    x = draw(1, 5)
    expected = module(x).detach()
    with masked(module):
        y = module(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        y.sum().backward()
    dead = ~module.router.live(module.router.scores(x))[0]
    assert dead.any() and not dead.all()
    assert (module.router.bias.grad[dead].abs() > 0).all()
    assert module.dispatch == "auto"
    assert "forward" not in vars(module.router)


def test_thresholds_follow_scores_that_drift() -> None:
    router = layer("threshold").router
    x = draw(512, 5)
    with torch.no_grad():
        router.bias += 4.0
    assert router.live(router.scores(x)).double().mean() > 0.8
    with Thresholds(router, rate=0.5) as held:
        for _ in range(20):
            router(x)
        with torch.no_grad():
            kept = held.shifts.clone()
            live = router.live(router.scores(x)).double().mean()
            assert torch.equal(held.shifts, kept)
    assert float(live) == pytest.approx(router.budget / router.routed, abs=0.01)
    assert "live" not in vars(router)


def test_resettling_makes_the_budgets_hold_again() -> None:
    module = layer("threshold")
    x = draw(512, 5)
    with torch.no_grad():
        module.router.bias += 3.0
    resettle(module, lambda: module(x))
    for active in (0.5, 0.75):
        module.router.set_active(active)
        module.counter.reset()
        module(x)
        assert module.counter.live_fraction == pytest.approx(active, abs=0.01)


# ---------------------------------------------------------------------------- schedules


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["linear", "cosine", "cubic"]), st.floats(0.05, 1), st.integers(0, 50),
    st.integers(0, 5),
)  # fmt: skip
def test_schedules_go_down_from_start_to_end(shape, end, steps, delay) -> None:
    schedule = Schedule(end, steps, shape=shape, delay=delay)
    budgets = [schedule.budget(step) for step in range(steps + delay + 2)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == end
    if steps:
        assert budgets[: delay + 1] == pytest.approx([1.0] * (delay + 1))


def test_a_schedule_turns_the_dial() -> None:
    module = layer("threshold")
    schedule = Schedule(0.5, 2, shape="linear")
    seen = [schedule.apply(module, step) for step in range(3)]
    assert seen == [1.0, 0.75, 0.5]
    assert module.router.active == 0.5
    with pytest.raises(BadInput, match="no schedule"):
        Schedule(0.5, 2, shape="cubist")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="not a budget"):
        Schedule(0.0, 2)


# ---------------------------------------------------------------------------- LoRA


def test_lora_starts_at_nothing_and_merges_bit_for_bit() -> None:
    module = torch.nn.ModuleDict({"moe": layer()})
    moe, x = module["moe"], draw(9, 5)
    assert isinstance(moe, RoutedFFN)
    shared = moe.up
    before, kept = moe(x).detach(), shared.detach().clone()
    made = lora.add(module, ["moe.up", "moe.gate", "moe.down"], rank=2)
    assert torch.equal(moe(x), before)
    moe(x).sum().backward()
    assert all(a.b.grad is not None and a.b.grad.abs().sum() > 0 for a in made.values())
    with torch.no_grad():
        for adapter in made.values():
            adapter.b.normal_(generator=torch.Generator().manual_seed(1))
    adapted = moe(x).detach()
    assert not torch.equal(adapted, before)
    with lora.disabled(module):
        assert torch.equal(moe(x), before)
    assert lora.merge(module) == ["moe.up", "moe.gate", "moe.down"]
    assert torch.equal(moe(x), adapted)
    assert torch.equal(shared, kept)  # the weight that another model may share
    assert type(moe) is RoutedFFN
    assert lora.adapters(module) == {}


def test_lora_removed_leaves_the_weights() -> None:
    module = torch.nn.ModuleDict({"moe": layer()})
    weight = module["moe"].up
    lora.add(module, ["moe.up"])
    lora.remove(module)
    assert module["moe"].up is weight
    with pytest.raises(BadInput, match="no weight"):
        lora.add(module, ["moe.down_bias"])
    with pytest.raises(BadInput, match="rank=0"):
        lora.add(module, ["moe.up"], rank=0)
