"""ffn-mole: experts in a shared latent; the fit, what is computed once, ranks, calibration."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sparsify
from sparsify.healing_loss import results
from sparsify.passes._lowrank import input_base, output_base
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.latent_ffn import LatentFFN
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router
from sparsify.runtime.spec import from_spec
from tests.contract.zoo_captures import captured, tokens_of

GATED = Program(
    ("up", "gate"),
    (Step("s", "aten.silu.default", (Ref("gate"),)),
     Step("h", "aten.mul.Tensor", (Ref("s"), Ref("up")))),
    "h",
)  # fmt: skip


@functools.cache
def compiled(options: str = "", calibrated: bool = False, dtype: Any = torch.float32) -> Any:
    cap = captured("llama", dtype)
    calibration = tokens_of(cap, "llama") if calibrated else None
    text = f"ffn-mole{{{options}}}"
    return sparsify.compile(cap, text, calibration=calibration, reproducer=None)


def layers(model: Any) -> list[LatentFFN]:
    return [m for m in model.modules() if isinstance(m, LatentFFN)]


def module(width: int = 6, rank: int = 4, experts: int = 4) -> LatentFFN:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    inner = RoutedFFN(
        draw(experts, 3, rank), draw(experts, 3, rank), draw(experts, 3, rank),
        draw(experts, 3), draw(experts, 3), None,
        activation=GATED, router=Router(draw(experts - 1, rank), shared=1, active=0.5),
    )  # fmt: skip
    return LatentFFN(draw(rank, width), inner, draw(rank, width), draw(width))


@torch.no_grad()
def test_it_is_the_naive_sum_over_tokens_and_live_experts() -> None:
    layer = module()
    inner = layer.experts
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    found = layer(x)
    for b in range(2):
        for t in range(5):
            scores = inner.router.weight @ (layer.read @ x[b, t]) + inner.router.bias
            live = [0, 1 + int(scores.argmax())]  # one shared, one of three: half of four
            y = layer.bias.clone()
            for e in live:
                up = (inner.up[e] @ layer.read) @ x[b, t] + inner.up_bias[e]
                gate = (inner.gate[e] @ layer.read) @ x[b, t] + inner.gate_bias[e]
                hidden = torch.nn.functional.silu(gate) * up
                y += (inner.down[e] @ layer.write).T @ hidden
            torch.testing.assert_close(found[b, t], y)
    assert layer.counter.rows == 10  # each token into the latent once, for all its experts
    assert inner.counter.rows == inner.counter.units_live == 20


def test_gradients_are_right_and_the_spec_gives_it_back() -> None:
    layer = module()
    router = layer.experts.router.requires_grad_(False)
    usual = router.forward
    # the selection is a step: its straight-through gradient is no derivative
    router.forward = lambda z: usual(z.detach())  # type: ignore[method-assign]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    names = ("read", "write", "experts.up", "experts.down")

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    weights = tuple(layer.get_parameter(name) for name in names)
    assert torch.autograd.gradcheck(run, (x, *weights))
    again = from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    assert again.spec() == layer.spec()
    assert torch.equal(again(x), layer(x))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 9), width=st.integers(2, 7), weighted=st.booleans(), seed=st.integers(0, 99)
)
def test_factors_are_the_best_of_their_rank(
    rows: int, width: int, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, x = draw(rows, width), draw(40, width) @ draw(width, width)
    inputs = x if weighted else torch.eye(width, dtype=torch.float64)
    tail = torch.linalg.svdvals(inputs @ weight.T).square()
    for rank in range(1, min(rows, width) + 1):
        best = float(tail[rank:].sum())
        slack = 1e-4 * float(tail.sum())  # the floor under directions that the data lack
        one, base = input_base(weight, rank, x if weighted else None)
        two, out = output_base(weight, rank, x if weighted else None)
        for product in (one @ base, (two @ out).T):
            lost = float((inputs @ (product - weight).T).square().sum())
            assert best - 1e-9 <= lost <= best + slack
        for orthonormal in (base, out):
            eye = torch.eye(rank, dtype=torch.float64)
            torch.testing.assert_close(orthonormal @ orthonormal.T, eye)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 3e-14)])
def test_at_full_rank_the_bound_follows_from_the_dtype(dtype: Any, most: float) -> None:
    (step,) = compiled(dtype=dtype).report.steps
    for evidence in step.evidence:
        assert evidence.ok and evidence.error > 0
        if evidence.scope == "region":
            assert most / 100 < evidence.tolerance / evidence.scale <= most


def test_below_full_rank_it_is_approximate_smaller_and_cheaper() -> None:
    model, full = compiled("rank=0.25"), compiled()
    region, end = (model.report.steps[0].evidence[i] for i in (0, -1))
    assert region.claim == end.claim == "APPROXIMATE" and end.error > 1e-3
    for layer, other in zip(layers(model), layers(full), strict=True):
        rank, width = layer.read.shape
        assert rank == width // 4 and other.read.shape == (width, width)
        assert layer.cost(1.0).flops * 3.9 < other.cost(1.0).flops
        for active in (1.0, 0.5):
            shared = 4 * rank * width
            assert layer.cost(active).flops - layer.experts.cost(active).flops == shared


@torch.no_grad()
def test_a_saved_approximation_is_verified_against_what_it_lost(tmp_path: Path) -> None:
    model = compiled("rank=0.5")
    model.save(tmp_path / "out")
    found = sparsify.verify(tmp_path / "out")
    known = model.report.steps[0].evidence[-1]
    assert found.ok and found.evidence[0].error == pytest.approx(known.error, rel=1e-3)
    again = sparsify.load(tmp_path / "out")
    layers(again)[0].write.mul_(2.0)
    assert not sparsify.verify(again).ok


@torch.no_grad()
def test_the_cost_is_what_is_multiplied() -> None:
    model = compiled("rank=0.5 shared=1")
    model.set_active(0.5)
    try:
        layer = layers(model)[0]
        x = torch.randn(1, 16, layer.read.shape[1])
        layer.counter.reset()
        with FlopCounterMode(display=False) as flops:
            layer(x)
        assert flops.get_total_flops() == 16 * layer.cost().flops
        assert layer.counter.rows == 16
    finally:
        model.set_active(1.0)


@torch.no_grad()
def test_calibration_weighs_the_fit_by_the_data_and_settles_the_experts() -> None:
    ids = torch.cat(tokens_of(captured("llama"), "llama"))
    dense = compiled()(input_ids=ids).logits
    errors = {}
    for calibrated in (False, True):
        model = compiled("rank=0.6", calibrated)
        errors[calibrated] = float((model(input_ids=ids).logits - dense).square().mean())
    assert errors[True] < 0.9 * errors[False]
    model = compiled("rank=0.6", True)
    assert all(layer.experts.slopes is not None for layer in layers(model))
    model.set_active(0.5)
    try:
        model.reset_counters()
        model(input_ids=ids)
        live = list(model.realised().values())
        assert len(live) == len(layers(model)) and abs(sum(live) / len(live) - 0.5) < 0.05
    finally:
        model.set_active(1.0)


def test_half_types_are_refused() -> None:
    model = sparsify.compile(captured("llama", torch.bfloat16), "ffn-mole", reproducer=None)
    remarks = model.report.steps[0].remarks
    assert all(r.kind == "left" and "half type" in r.reason for r in remarks)


def test_healing_compares_what_leaves_the_latent() -> None:
    for text in ("ffn-mole", "ffn-mohd"):  # modules whose parts count their work
        model = sparsify.compile(captured("llama"), text, reproducer=None)
        found = results(model)
        assert sorted(found) == [f"model.layers.{n}.mlp.{text[4:]}" for n in (0, 1)]
