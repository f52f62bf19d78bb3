"""ffn-supernet: weights mixed for the live width; against loops, cached per width, trained."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsify
from sparsify.runtime import lora
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.spec import from_spec
from sparsify.runtime.supernet import ArchitectureRouter, SupernetFFN
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import captured, tokens_of

GATED = Program(
    ("up", "gate"),
    (Step("s", "aten.silu.default", (Ref("gate"),)),
     Step("h", "aten.mul.Tensor", (Ref("s"), Ref("up")))),
    "h",
)  # fmt: skip


def module(
    experts: int = 3, size: int = 8, per: str = "layer", active: float = 0.5, kept: int = 4
) -> SupernetFFN:
    """Experts that differ, as after training."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    groups = 1 if per == "layer" else size
    router = ArchitectureRouter(
        draw(7), draw(7), draw(experts, groups, 7), draw(experts, groups), size=size, active=active
    )
    weights = [draw(experts, size, 6) for _ in range(3)]
    return SupernetFFN(
        *weights, draw(experts, size), draw(experts, size), draw(6),
        activation=GATED, router=router, order=torch.arange(size).flip(0), kept=kept,
    ).eval()  # fmt: skip


def naive(layer: SupernetFFN, x: Tensor) -> Tensor:
    """Neuron by neuron, expert by expert."""
    router, live = layer.router, layer.router.count
    features = (router.inner * (live / router.size) + router.inner_bias).clamp_min(0)
    y = layer.down_bias.expand(*x.shape[:-1], -1).clone()
    for n in range(live):
        group = n if router.out.shape[1] > 1 else 0
        scores = [router.out[e, group] @ features + router.out_bias[e, group] for e in range(3)]
        g = torch.stack(scores).exp()
        g = g / g.sum()
        up = sum(g[e] * (x @ layer.up[e, n] + layer.up_bias[e, n]) for e in range(3))
        gate = sum(g[e] * (x @ layer.gate[e, n] + layer.gate_bias[e, n]) for e in range(3))
        column = sum(g[e] * layer.down[e, n] for e in range(3))
        y += (nn.functional.silu(gate) * up).unsqueeze(-1) * column
    return y


@torch.no_grad()
@pytest.mark.parametrize("per", ["layer", "neuron"])
@pytest.mark.parametrize("active", [0.25, 0.7, 1.0])
def test_it_is_the_naive_sum_and_kept_weights_change_nothing(per: str, active: float) -> None:
    layer = module(per=per, active=active)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = naive(layer, x)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)
    layer.dispatch = "grouped"
    torch.testing.assert_close(layer(x), expected)
    assert (layer.counter.mixed, layer.counter.reused) == (2, 1)


@torch.no_grad()
def test_weights_are_mixed_once_per_width_and_only_live_neurons_are_touched() -> None:
    layer = module(kept=2)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    first = {}
    for active in (0.5, 0.25, 0.5, 0.25, 0.5):  # the dial goes back and forth
        layer.router.set_active(active)
        y = layer(x)
        assert torch.equal(first.setdefault(active, y), y)
    counter = layer.counter
    assert (counter.mixed, counter.reused) == (2, 3)
    assert counter.mixed_rows == 3 * 3 * (4 + 2)  # three experts and matrices, of 8 neurons 4 or 2
    assert counter.rows == counter.units_live == 10 * (3 * 4 + 2 * 2)
    assert counter.rows_dense == 10 * 8 * 5
    layer.router.set_active(1.0)
    layer(x)
    assert set(layer._mixed) == {4, 8}  # two are kept: the latest used


@torch.no_grad()
def test_dead_neurons_are_not_read() -> None:
    layer, x = module(active=0.5), torch.randn(4, 6, dtype=torch.float64)
    expected = layer(x)
    for name in ("up", "gate", "down", "up_bias", "gate_bias"):
        getattr(layer, name)[:, layer.router.count :] = float("nan")
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("change", ["weight", "router", "load", "move", "adapter"])
@torch.no_grad()
def test_changes_empty_the_cache(change: str) -> None:
    layer, x = module(), torch.randn(4, 6, dtype=torch.float64)
    before = layer(x)
    if change == "weight":
        layer.down.add_(0.25)
    elif change == "router":
        layer.router.out_bias[0] += 1
    elif change == "load":
        layer.load_state_dict({k: v * 1.5 if v.is_floating_point() else v
                               for k, v in layer.state_dict().items()})  # fmt: skip
    elif change == "move":
        layer.float()
        x = x.float()
    else:
        (adapter,) = lora.add(layer, ["up"], rank=2).values()
        adapter.b.fill_(0.5)
        adapted = layer(x)
        with lora.disabled(layer):
            torch.testing.assert_close(layer(x), before)
        assert torch.equal(layer(x), adapted) and not torch.allclose(adapted, before)
    found = layer(x)
    torch.testing.assert_close(found, naive(layer, x))
    assert change == "move" or not torch.allclose(found, before)


def test_training_and_copies_use_no_cache() -> None:
    layer, x = module(), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        assert layer._mixed and not copy.deepcopy(layer)._mixed
        layer.train()(x)
    assert not layer._mixed
    layer.eval()(x).sum().backward()  # autograd watches
    assert not layer._mixed and layer.router.out.grad is not None


@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_gradients_are_right_and_the_spec_gives_it_back(per: str) -> None:
    layer = module(per=per, size=4)
    names = ("up", "gate", "down", "up_bias", "router.inner", "router.out", "router.out_bias")

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(layer.get_parameter(n) for n in names)))
    again = from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    assert again.spec() == layer.spec()
    assert torch.equal(again(x), layer(x))


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(2, 5), size=st.integers(2, 9), per=st.sampled_from(["layer", "neuron"]),
    active=st.floats(0.05, 1.0),
)  # fmt: skip
def test_mixes_sum_to_one_and_widths_meet_the_budget(
    experts: int, size: int, per: str, active: float
) -> None:
    router = module(experts, size, per, active).router
    mix = router.mix()
    assert mix.shape == (experts, router.count if per == "neuron" else 1)
    assert bool((mix >= 0).all())
    torch.testing.assert_close(mix.sum(0), torch.ones_like(mix[0]))
    assert router.count == 1 or abs(router.count - active * size) <= 0.5 + 1e-9


# ---------------------------------------------------------------------------- the pass


@functools.cache
def compiled(options: str = "", calibrated: bool = False) -> Any:
    cap = captured("llama")
    calibration = tokens_of(cap, "llama") if calibrated else None
    text = f"ffn-supernet{{{options}}}"
    return sparsify.compile(cap, text, calibration=calibration, reproducer=None)


def layers(model: Any) -> list[SupernetFFN]:
    return [m for m in model.modules() if isinstance(m, SupernetFFN)]


@torch.no_grad()
@pytest.mark.parametrize("mix", ["layer", "neuron"])
def test_a_width_is_static_pruning_before_training_and_costs_what_it_multiplies(mix: str) -> None:
    model = compiled(f"mix={mix} experts=3")
    dense = dict(captured("llama").graph.named_parameters())
    model.set_active(0.5)
    try:
        layer = layers(model)[0]
        keep = layer.order[: layer.router.count]
        assert len(keep) == layer.router.size // 2
        names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (dense[f"model.layers.0.mlp.{n}.weight"] for n in names)
        worth = up.square().sum(1) * gate.square().sum(1) * down.square().sum(0)
        dead = layer.order[layer.router.count :]
        assert float(worth[keep].min()) >= float(worth[dead].max())
        x = torch.randn(1, 16, up.shape[1])
        hidden = nn.functional.silu(x @ gate[keep].T) * (x @ up[keep].T)
        layer(x)  # mixes
        with FlopCounterMode(display=False) as flops:
            found = layer(x)
        torch.testing.assert_close(found, hidden @ down[:, keep].T)
        assert flops.get_total_flops() == 16 * layer.cost().flops
        assert 2 * layer.cost().flops == layer.cost(1.0).flops
    finally:
        model.set_active(1.0)


@torch.no_grad()
def test_calibration_orders_by_energy_and_spreads_the_budget() -> None:
    ids = torch.cat(tokens_of(captured("llama"), "llama"))
    dense = compiled()(input_ids=ids).logits
    errors = []
    for calibrated in (False, True):
        model = compiled("", calibrated)
        assert all((layer.router.errors is not None) == calibrated for layer in layers(model))
        model.set_active(0.5)
        errors.append(float((model(input_ids=ids).logits - dense).square().mean()))
        live = [layer.router.count / layer.router.size for layer in layers(model)]
        assert abs(sum(live) / len(live) - 0.5) < 0.02
        model.set_active(1.0)
    assert errors[1] < errors[0]


def test_training_over_widths_tells_the_experts_apart_and_then_moves_the_router() -> None:
    model = copy.deepcopy(compiled())
    ids = tokens_of(captured("llama"), "llama")[0]
    with torch.no_grad():
        target = model(input_ids=ids).logits
    model.train()
    layer = layers(model)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    moves = model.report.steps[0].weights
    before, moved, losses = dense_weights(model, moves), [], []
    for step in range(8):
        model.set_active((0.3, 0.6)[step % 2])  # the supernet's sampled architectures
        loss = (model(input_ids=ids).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        moved.append(float(layer.router.out.grad.abs().max()) / float(layer.up.grad.abs().max()))
        optimizer.step()
        losses.append(loss.item())
    assert not torch.equal(layer.up[0], layer.up[1])
    assert moved[-1] > 1e3 * moved[0]  # equal experts give the router rounding errors only
    assert losses[-1] < losses[1] and losses[-2] < losses[0]
    model.eval().set_active(1.0)
    after = dense_weights(model, moves)  # the mix of the full width, as it runs
    mixed = layer._mix().up
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(after[name], mixed[layer.order.argsort()])
    assert not torch.equal(after[name], before[name])
