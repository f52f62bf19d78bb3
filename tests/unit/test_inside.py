"""hidden-route inside the experts of ffn-moe: a naive form, what is skipped, the budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.inside import LiveNeurons
from sparsify.runtime.spec import from_spec
from tests.contract.zoo_captures import captured, tokens_of

PIPELINE = "ffn-moe{experts=24},hidden-route{at=*.down_proj}"


@pytest.fixture(scope="module", params=["threshold", "top-k"])
def model(request: Any) -> Any:
    cap = captured("llama")
    tokens = tokens_of(cap, "llama") if request.param == "threshold" else None
    made = sparsify.compile(cap, PIPELINE, calibration=tokens, reproducer=None, share=False)
    yield made
    made.set_active(1.0)


def experts_of(model: Any) -> list[RoutedFFN]:
    return [m for m in model.modules() if isinstance(m, RoutedFFN)]


def naive(ffn: RoutedFFN, x: Tensor) -> tuple[Tensor, int]:
    """Token by token, neuron by neuron; and how many neurons passed their value on."""
    inside = ffn.inside
    assert inside is not None and ffn.gate is not None
    y, passed, m = torch.zeros_like(x), 0, ffn.hidden
    scores = ffn.router.scores(x)
    live = ffn.router(x) != 0
    for t in range(len(x)):
        for e in range(ffn.experts):
            if not live[t, e]:
                continue
            hidden = ffn.activation(ffn.up[e] @ x[t], ffn.gate[e] @ x[t])
            at = slice(e * m, e * m + m)
            centre = torch.zeros(m) if inside.centre is None else inside.centre[at]
            score = (hidden - centre).abs() * inside.scale[at]
            if inside.rule == "threshold":
                keep = score > inside.threshold
            else:
                rank = score.argsort(descending=True).argsort()
                keep = rank < max(int(inside.active * m + 0.5), 1)
            passed += int(keep.sum())
            y[t] += torch.where(keep, hidden, centre) @ ffn.down[e]
    for left, right in ffn._stand_ins(live, scores):
        y += left.to(y.dtype) @ right
    return y, passed


@torch.no_grad()
@pytest.mark.parametrize("dispatch", ["auto", "grouped", "masked"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("budgets", [(0.5, 0.5), (1.0, 0.4)])
def test_naive_form(model: Any, dispatch: Any, tokens: int, budgets: tuple[float, float]) -> None:
    model.set_active(budgets[0], pass_name="ffn-moe")
    model.set_active(budgets[1], pass_name="hidden-route")
    ffn = experts_of(model)[0]
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    wanted, passed = naive(ffn, x)
    ffn.dispatch = dispatch
    try:
        assert ffn.inside is not None
        ffn.inside.counter.reset()
        torch.testing.assert_close(ffn(x), wanted, rtol=1e-4, atol=1e-5)
        if dispatch != "masked":  # masked computes every expert
            assert ffn.inside.counter.units_live == passed
        if tokens == 1 and dispatch != "masked":  # only live rows are read
            assert ffn.inside.counter.rows == passed
    finally:
        ffn.dispatch = "auto"


@torch.no_grad()
def test_dead_neurons_are_not_read(model: Any) -> None:
    """Rows of down that no token uses may hold anything."""
    model.set_active(0.5)
    ffn = experts_of(model)[1]
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for dispatch in ("auto", "grouped"):
        ffn.dispatch = dispatch  # type: ignore[assignment]
        wanted = ffn(x)
        live = ffn.router(x) != 0
        assert ffn.inside is not None
        hidden = ffn.neurons(x).view(2, ffn.experts, ffn.hidden)
        used = (ffn.inside(hidden, slice(None)) != 0) & live[..., None]
        before = ffn.down.clone()
        ffn.down[~used.any(0)] = torch.nan
        try:
            assert torch.equal(ffn(x), wanted)
        finally:
            ffn.down.copy_(before)
            ffn.dispatch = "auto"


def test_budgets_hold_and_the_dial_knows_the_passes() -> None:
    cap = captured("llama")
    tokens = tokens_of(cap, "llama")
    model: Any = sparsify.compile(cap, PIPELINE, calibration=tokens, reproducer=None)
    steps = model.report.steps
    assert [r.reason.split(":")[0] for r in steps[1].remarks if r.kind == "applied"] == [
        "down inside the experts"
    ] * 2
    model.set_active(0.5)
    model.reset_counters()
    with torch.no_grad():
        model(input_ids=torch.cat(tokens))
    realised = model.realised()
    inside = [live for path, live in realised.items() if path.endswith("inside")]
    assert len(inside) == 2 and abs(sum(inside) / 2 - 0.5) < 0.06
    model.set_active(1.0, pass_name="hidden-route")
    assert all(m.all_live for m in model.modules() if isinstance(m, LiveNeurons))
    assert not experts_of(model)[0].router.all_live
    model.set_active(1.0)


def test_cost_spec_and_gradients(model: Any) -> None:
    ffn = experts_of(model)[0]
    model.set_active(1.0)
    full = ffn.cost(1.0).flops
    assert ffn.inside is not None
    ffn.inside.set_active(0.5)
    means = 0 if ffn.inside.means is None else ffn.experts * ffn.width
    assert ffn.cost(1.0).flops == full + 2 * (means - 96 * 32 // 2)
    again: Any = from_spec(ffn.spec())
    again.load_state_dict(ffn.state_dict())
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(x), ffn(x))
    assert again.inside.pass_name == "hidden-route"
    ffn(x).square().sum().backward()
    assert ffn.down.grad is not None and float(ffn.down.grad.abs().sum()) > 0
    assert ffn.up.grad is not None and float(ffn.up.grad.abs().sum()) > 0
    ffn.zero_grad()


def test_gate_and_up_stay_whole_inside() -> None:
    model: Any = sparsify.compile(captured("llama"), "ffn-moe,hidden-route", reproducer=None)
    left = [r for r in model.report.steps[1].remarks if r.kind == "left"]
    assert {r.region.rpartition(".")[2] for r in left} == {"gate_proj", "up_proj"}
    assert all("ffn-moe rewrote" in r.reason for r in left)


@torch.no_grad()
def test_saved_and_loaded(model: Any, tmp_path: Any) -> None:
    model.set_active(0.5)
    model.save(tmp_path / "out")
    again: Any = sparsify.load(tmp_path / "out")
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert sparsify.verify(tmp_path / "out").ok
