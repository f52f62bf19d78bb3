"""ffn-compressed: dead experts as vectors that modulate the live experts' output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsify
from sparsify.errors import BadInput
from sparsify.healing_state import Trainee
from sparsify.passes._ridge import SHRINK, fit_modulation, fit_stand_ins
from sparsify.passes.ffn_compressed import FfnCompressed
from sparsify.runtime.compressed import CompressedFFN
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router
from sparsify.runtime.spec import from_spec
from tests.contract.zoo_captures import captured, tokens_of, worst_relative
from tests.unit.runtime.examples import Dense

RELU = Program(("up",), (Step("h", "aten.relu.default", (Ref("up"),)),), "h")
DISPATCH = pytest.mark.parametrize("dispatch", ["auto", "grouped", "masked"])


def made(dense: Dense, dispatch: str = "auto", *, zero: bool = False) -> CompressedFFN:
    """``dense`` with compressed experts, and random vectors unless ``zero``."""
    parts = dense.routed()
    routed = dense.router.routed
    vectors = torch.randn(routed, dense.width, generator=dense.g, dtype=torch.float64) / 3
    module = CompressedFFN(
        parts.up,
        parts.gate,
        parts.down,
        parts.up_bias,
        parts.gate_bias,
        parts.down_bias,
        activation=parts.activation,
        router=parts.router,
        dropped=parts.dropped,
        order=parts.order,
        vectors=None if zero else vectors.to(dense.dtype),
    )
    module.dispatch = dispatch  # type: ignore[assignment]
    return module


def naive(dense: Dense, module: CompressedFFN, x: Tensor) -> Tensor:
    """Token by token: main experts one by one, then the vectors of the others."""
    block = len(dense.order) // dense.experts
    shared, hidden = module.router.shared, dense.hidden(x)[:, dense.order]
    columns = dense.down.t()[dense.order]
    rows = []
    for token, scores in enumerate(module.router.scores(x)):
        best = scores.argsort(descending=True)[: round(module.router.budget)] + shared
        main = [*range(shared), *best.tolist()]
        total = torch.zeros(dense.width, dtype=x.dtype)
        if dense.down_bias is not None:
            total = total + dense.down_bias
        for expert in main:
            mine = slice(expert * block, (expert + 1) * block)
            total = total + hidden[token, mine] @ columns[mine]
        factor, rest = torch.ones_like(total), torch.zeros_like(total)
        for expert in set(range(dense.experts)) - set(main):
            factor = factor + module.vectors[expert - shared]
            if dense.dropped is not None:
                rest = rest + dense.dropped[expert]
        rows.append(total * factor + rest)
    return torch.stack(rows)


@DISPATCH
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.sampled_from([0.2, 0.5, 0.8]), st.booleans(), st.booleans(),
    st.integers(0, 2), st.integers(0, 99),
)  # fmt: skip
def test_is_the_naive_form(
    dispatch: str, tokens: int, active: float, bias: bool, dropped: bool, shared: int, seed: int
) -> None:
    dense = Dense(bias=bias, dropped=dropped, shared=shared, seed=seed)
    dense.router.set_active(active, warn=False)
    module = made(dense, dispatch)
    x = dense.x(tokens)
    torch.testing.assert_close(module(x), naive(dense, module, x))


def test_few_tokens_read_live_rows_only() -> None:
    """The path that decoding takes."""
    dense = Dense(hidden=96, experts=24, shared=4, active=0.5, dropped=True)
    module = made(dense)
    x = dense.x(5)
    with torch.no_grad():
        assert module._can_pick(x)
        torch.testing.assert_close(module(x), naive(dense, module, x))
    assert module.counter.rows == module.counter.units_live == 5 * 12
    assert module.counter.rows_dense == 5 * 24


@DISPATCH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_all_live_is_the_dense_layer(dispatch: str, dtype: torch.dtype, tolerance: float) -> None:
    dense = Dense(dropped=True, dtype=dtype)
    module, x = made(dense, dispatch), dense.x(9)
    want = dense(x)
    assert (module(x) - want).abs().max() <= tolerance * want.abs().max()


@DISPATCH
def test_identity_drops_the_dead(dispatch: str) -> None:
    dense = Dense(active=0.5)
    module, x = made(dense, dispatch, zero=True), dense.x(9)
    torch.testing.assert_close(module(x), dense.routed()(x))


def test_half_types_and_autocast_modulate_in_float32() -> None:
    exact = Dense(width=32, hidden=64, experts=8, active=0.5)
    want = made(exact)(x := exact.x(20))
    half = Dense(width=32, hidden=64, experts=8, active=0.5, dtype=torch.bfloat16)
    module = made(half)
    module.router = exact.routed().router.to(torch.bfloat16)
    y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    single = Dense(width=32, hidden=64, experts=8, active=0.5, dtype=torch.float32)
    wide = made(single)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = wide(x.float())
    for found in (y, mixed):
        close = ((found.double() - want).abs() < 0.05 * want.abs().max()).double().mean()
        assert close > 0.9  # a few tokens change an expert where scores are rounded


@DISPATCH
def test_gradients(dispatch: str) -> None:
    dense = Dense(width=4, hidden=12, active=0.5, dropped=True)
    module, x = made(dense, dispatch), dense.x(5)

    def run(x: Tensor, *given: Tensor) -> Tensor:
        names = ("vectors", "up", "down", "down_bias")
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x,))

    select = module.router(x).detach()  # piecewise constant: its gradient has the next test
    module.router.forward = lambda *_: select  # type: ignore[method-assign, assignment]
    given = [getattr(module, n).detach().clone() for n in ("vectors", "up", "down", "down_bias")]
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, *given)])


def test_routers_learn_what_replacing_costs() -> None:
    """d y / d select of an expert: its output, modulated as the live ones', less its vector."""
    dense = Dense(active=0.5, shared=1)
    module, x = made(dense), dense.x(1)
    scores = module.router.scores(x).detach().requires_grad_()
    select = module.router.select(x, scores).weights
    mask = select.detach()
    weight = mask.clone().requires_grad_()  # the same layer, as a function of its weights
    block = len(dense.order) // dense.experts
    neurons = dense.hidden(x)[:, dense.order].view(dense.experts, block, 1)
    outputs = (neurons * dense.down.t()[dense.order].view(dense.experts, block, -1)).sum(1)
    live = (
        outputs[0] + weight[0] @ outputs[1:] + (0 if dense.down_bias is None else dense.down_bias)
    )
    loss = (live * (1 + (1 - weight[0]) @ module.vectors.detach())).square().sum()
    (want,) = torch.autograd.grad(select, scores, torch.autograd.grad(loss, weight)[0])
    module.router.scores = lambda _: scores  # type: ignore[method-assign]
    (found,) = torch.autograd.grad(module(x).square().sum(), scores)
    torch.testing.assert_close(found, want)
    assert float(found.abs().sum()) > 0


def test_spec_round_trip() -> None:
    dense = Dense(active=0.5)
    module, x = made(dense), dense.x(7)
    for table in (False, True):
        if table:
            module.add_vectors(0.75, module.vectors.detach() / 2)
            module.add_vectors(0.25, module.vectors.detach()[0])
            assert module.vectors_at == (0.25, 0.75)
        again = from_spec(module.spec())
        assert isinstance(again, CompressedFFN)
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(x), module(x))
        assert again.spec() == module.spec()


def test_vectors_follow_the_budget() -> None:
    module = made(Dense())
    low, high = torch.ones(5, 12), torch.full((5, 12), 3.0)
    module.add_vectors(0.75, high)
    module.add_vectors(0.25, low * 7)
    module.add_vectors(0.25, low)  # replaces the row
    for active, value in [(0.2, 1), (0.25, 1), (0.5, 2), (0.75, 3), (0.9, 3)]:
        module.router.set_active(active)
        torch.testing.assert_close(module._vectors().double(), low.double() * value)


def test_cost_is_a_product_more() -> None:
    dense = Dense(active=0.5)
    module, plain = made(dense), dense.routed()
    assert module.cost(1.0) == plain.cost(1.0)
    assert module.cost(0.5).flops - plain.cost(0.5).flops == 2 * 5 * 12
    assert module.cost(0.5).bytes - plain.cost(0.5).bytes == 5 * 12 * 8


def test_bad_arguments() -> None:
    module = made(Dense())
    tensors: Any = (module.up, module.gate, module.down, None, None, None)
    common: Any = {"activation": module.activation, "router": module.router}
    with pytest.raises(BadInput, match="vectors"):
        CompressedFFN(*tensors, vectors=torch.zeros(4, 12), **common)
    ordered = Router(torch.zeros(6, 12), order=torch.arange(6), active=0.5)
    with pytest.raises(BadInput, match="in order"):
        CompressedFFN(*tensors, activation=module.activation, router=ordered)


# ---------------------------------------------------------------------------- the fit


def test_fit_is_the_ridge_regression() -> None:
    """Against one explicit least-squares problem per output, with the ridge as further rows."""
    g = torch.Generator().manual_seed(0)
    tokens, units, width = 1500, 4, 3
    dead = torch.rand(tokens, units, generator=g) < torch.tensor([0.2, 0.5, 0.9, 0.0])
    given = torch.randn(tokens, width, generator=g).double()
    given[:, 2] = 0  # nothing to multiply
    truth = torch.randn(units, width, generator=g).double()
    noise = 0.1 * torch.randn(tokens, width, generator=g)
    missing = given * (dead.double() @ truth) + noise
    found = fit_modulation(dead, given, missing)
    assert (found[3] == 0).all()  # never dead
    assert (found[:, 2] == 0).all()
    torch.testing.assert_close(found[:3, :2].double(), truth[:3, :2], atol=0.1, rtol=0.05)
    for d in range(2):
        design = given[:, d : d + 1] * dead.double()
        energy = design.square().sum(0)
        ridge = (SHRINK * energy + 0.25 * SHRINK * energy.mean()).sqrt().diag()
        rows = torch.cat([design, ridge])
        right = torch.cat([missing[:, d], torch.zeros(units)]).unsqueeze(1)
        want = torch.linalg.lstsq(rows, right).solution.squeeze(1)
        torch.testing.assert_close(found[:, d].double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compensate", [True, False])
def test_a_vector_costs_less_than_a_mean(compensate: bool) -> None:
    """Tokens of many sizes through a ReLU layer: what is lost grows with what is left.

    Fitted to some tokens, measured on others.
    """
    dense = Dense(width=16, hidden=64, experts=8, shared=2, gated=False, bias=False, seed=3)
    dense.activation = RELU
    sizes = torch.rand(4000, 1, generator=dense.g, dtype=torch.float64) * 3
    x = (dense.x(4000) + 0.7) * sizes
    x, held_out = x[:2000], x[2000:]
    module = made(dense, zero=True)
    module.router.calibrate(x)
    module.router.rule = "threshold"
    module.router.set_active(0.5)
    errors = {}

    def measure(name: str) -> None:
        full = dense_layer(module, held_out)
        with torch.no_grad():
            errors[name] = float((module(held_out) - full).square().sum() / full.square().sum())

    measure("dropped")
    neurons = module.neurons(x).detach()
    means = (neurons.mean(0).view(8, 1, 8) @ module.down.detach()).squeeze(1)
    module.add_stand_ins(0.5, means, torch.zeros(6, 16))
    measure("means")
    constants, slopes, _ = fit_stand_ins(module, x, module.router.scores(x).detach())
    module.add_stand_ins(0.5, constants, slopes)
    measure("stand-ins")
    module.dropped = module.slopes = None
    module.dropped_at = ()
    with torch.no_grad():
        y = FfnCompressed(compensate=compensate).settle(module, (x,), True)
    if y is not None:
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4)
    measure("vectors")
    if compensate:
        assert errors["vectors"] < 0.75 * errors["means"], errors
        assert errors["vectors"] < 0.98 * errors["stand-ins"], errors
    else:  # nothing but vectors: better than nothing
        assert errors["vectors"] < 0.8 * errors["dropped"], errors


def dense_layer(module: CompressedFFN, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.neurons(x) @ module.down.flatten(0, 1)


def test_calibrated(tmp_path: Path) -> None:
    cap = captured("llama")
    batches = tokens_of(cap, "llama")
    model = sparsify.compile(cap, "ffn-compressed", calibration=batches, reproducer=None)
    assert worst_relative(model) <= 1e-5
    layers = [m for m in model.modules() if isinstance(m, CompressedFFN)]
    assert layers
    for layer in layers:
        assert len(layer.vectors_at) == len(layer.dropped_at) == 3
        assert layer.vectors.requires_grad
        assert bool(layer.vectors.any())
    trained = Trainee.of(model, "routers", rank=0, seed=0)
    assert sum(name.endswith(".vectors") for name in trained.groups["stand-ins"]) == len(layers)
    trained.unfreeze()
    model.set_active(0.5)
    ids = torch.cat(batches)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    model.save(tmp_path / "out")
    again = sparsify.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, found)
    for layer in layers:  # what the fit saw: no worse with vectors than without
        x = torch.randn(600, layer.width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            dead, given, missing = layer.without_vectors(x, layer.router.scores(x))
            best = given * (dead.float() @ fit_modulation(dead, given, missing))
            assert (missing - best).square().sum() < missing.square().sum()
