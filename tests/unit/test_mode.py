"""ffn-mode: experts by noise level, on a diffusion transformer through whole denoising loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.match import find
from sparsify.runtime.conditioned import ConditionedFFN
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router
from tests.contract.zoo_captures import captured

STEPS = (900, 700, 500, 300, 100)


def routed_dit(options: str = "") -> Any:
    text = f"ffn-mode{{noise=1.0{options}}}"
    model = sparsify.compile(captured("dit"), text, reproducer=None)
    return model.set_active(0.5)


def layers(model: nn.Module) -> list[ConditionedFFN]:
    return [m for m in model.modules() if isinstance(m, ConditionedFFN)]


@torch.no_grad()
def denoise(model: Any, labels: Tensor, seed: int = 0) -> Tensor:
    """DDIM steps (Song et al., arXiv:2010.02502, eta = 0), cosine noise schedule."""
    x = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(seed))

    def kept(t: int) -> float:
        return float(torch.cos(torch.tensor(t / 1000 * torch.pi / 2)) ** 2)

    for t, after in zip(STEPS, (*STEPS[1:], 0), strict=True):
        (noise,) = model(
            hidden_states=x,
            timestep=torch.full((len(labels),), t),
            class_labels=labels,
            return_dict=False,
        )
        clean = (x - (1 - kept(t)) ** 0.5 * noise) / kept(t) ** 0.5
        x = kept(after) ** 0.5 * clean + (1 - kept(after)) ** 0.5 * noise
    return x


def test_a_denoising_loop_is_the_same_with_the_cache_and_counts_what_it_saves() -> None:
    labels = torch.tensor([1, 3, 1])  # two samples share every condition
    model, uncached = routed_dit(), routed_dit(" cache=0")
    for seed in (0, 1):
        assert torch.equal(denoise(model, labels, seed), denoise(uncached, labels, seed))
    for layer, plain in zip(layers(model), layers(uncached), strict=True):
        calls = 2 * len(STEPS) * len(labels)  # two loops
        new = len(STEPS) * 2  # conditions: noise levels x classes
        assert (layer.counter.scored, layer.counter.recalled) == (new, calls - new)
        assert layer.counter.fused <= new and layer.counter.fused + layer.counter.reused == calls
        assert layer.counter.fused < plain.counter.fused
        assert layer.counter.copied < plain.counter.copied
        assert plain.counter.scored == 2 * new  # within a call samples share, between calls none do
        tokens = calls * 16
        assert layer.counter.rows == layer.counter.units_live == tokens * layer.experts // 2
        assert layer.counter.rows_dense == 2 * layer.counter.rows


def test_fused_is_the_sum_of_the_live_experts() -> None:
    model = routed_dit()
    labels = torch.tensor([1, 3, 7])
    fused = denoise(model, labels)
    for layer in layers(model):
        layer.dispatch = "grouped"  # expert by expert, token by token, no cache
    torch.testing.assert_close(fused, denoise(model, labels), rtol=1e-4, atol=1e-5)


def test_noise_levels_choose_different_experts() -> None:
    model = routed_dit(" cache=64")
    denoise(model, torch.tensor([1, 3]))
    for layer in layers(model):
        assert len(set(layer._choices.values())) > 1
        assert all(sum(choice) == layer.experts // 2 for choice in layer._choices.values())


def module(experts: int = 4, sets: int = 8) -> ConditionedFFN:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    gated = Program(
        ("up", "gate"),
        (Step("s", "aten.silu.default", (Ref("gate"),)),
         Step("h", "aten.mul.Tensor", (Ref("s"), Ref("up")))),
        "h",
    )  # fmt: skip
    made = ConditionedFFN.from_dense(
        draw(12, 6), draw(12, 6), draw(6, 12), draw(12), draw(12), draw(6),
        experts=experts, activation=gated, router=Router(draw(experts, 5).detach()),
    )  # fmt: skip
    made.sets = sets
    made.router.set_active(0.5)
    return made.eval()


@torch.no_grad()
def test_samples_do_not_mix_and_order_does_not_matter() -> None:
    layer = module()
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    condition = torch.randn(5, 5, dtype=torch.float64)
    together = layer(x, condition)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(layer(x[order], condition[order]), together[order])
    for sample in range(5):
        one = slice(sample, sample + 1)
        torch.testing.assert_close(module()(x[one], condition[one]), together[one])


@pytest.mark.parametrize("change", ["optimizer", "load", "dial", "move", "router"])
@torch.no_grad()
def test_changes_of_weights_and_dial_empty_the_cache(change: str) -> None:
    layer = module()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    condition = torch.randn(2, 5, dtype=torch.float64)
    before = layer(x, condition)
    assert torch.equal(layer(x, condition), before)
    assert layer.counter.recalled == 2 and layer.counter.reused >= 2
    if change == "optimizer":
        layer.up.add_(0.25)
    elif change == "load":
        state = {name: tensor * 1.5 for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(state)
    elif change == "dial":
        layer.router.set_active(0.75)
    elif change == "router":
        layer.router.weight.neg_()
    else:
        layer.float()
        x, condition = x.float(), condition.float()
    found = layer(x, condition)
    layer.dispatch = "grouped"
    torch.testing.assert_close(found, layer(x, condition))
    assert change == "move" or not torch.allclose(found, before)


def test_training_and_copies_use_no_cache() -> None:
    layer = module()
    x, condition = torch.randn(2, 2, 3, 6, dtype=torch.float64), torch.randn(2, 5).double()
    with torch.no_grad():
        layer(x[0], condition)
        assert layer._fused and not copy.deepcopy(layer)._fused
        layer.train()
        assert not layer._fused
        layer(x[0], condition)
        assert not layer._fused
    layer.eval()
    layer(x[0], condition).sum().backward()  # autograd watches
    assert not layer._fused and layer.router.weight.grad is not None


def test_fewer_sets_than_needed_stay_right() -> None:
    with torch.no_grad():
        layer, roomy = module(sets=1), module()
        for _ in range(2):
            x = torch.randn(6, 2, 6, dtype=torch.float64)
            condition = torch.randn(6, 5, dtype=torch.float64)
            assert torch.equal(layer(x, condition), roomy(x, condition))
        assert len(layer._fused) == 1


def test_gradients_are_right() -> None:
    layer = module()
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(2, 5, dtype=torch.float64)

    def run(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights = {"up": up, "down": down}
        return torch.func.functional_call(layer, weights, (x, condition))

    inputs = (x, layer.up, layer.down)
    assert torch.autograd.gradcheck(run, inputs)


class Modulated(nn.Module):
    """A block whose input a vector scales and shifts, spelled by hand; or only looks like it."""

    def __init__(self, conditioned: bool) -> None:
        super().__init__()
        self.conditioned = conditioned
        self.norm = nn.LayerNorm(8)
        self.make = nn.Linear(5, 16)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        both = self.make(c)
        scale, shift = both.chunk(2, dim=-1)
        h = self.norm(x)
        if self.conditioned:
            h = torch.addcmul(shift[:, None], h, 1 + scale[:, None])
        else:
            h = h + both.mean()  # one number for all samples
        return x + self.down(torch.relu(self.up(h)))


def test_the_condition_is_found_by_its_role() -> None:
    from sparsify.capture import capture

    example = (torch.randn(3, 4, 8), torch.randn(3, 5))
    for conditioned in (True, False):
        cap = capture(Modulated(conditioned), example)
        (ffn,) = [r for r in find(cap.graph, cap.example).regions if r.kind == "FeedForward"]
        assert ffn.condition_width == (5 if conditioned else 0)
    report = sparsify.compile(Modulated(False), "ffn-mode", example).report
    (remark,) = report.steps[0].remarks
    assert remark.kind == "left" and "no noise level" in remark.reason
