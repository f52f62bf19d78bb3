"""The routed feed-forward layer against the dense layer computed in full and masked."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router
from sparsify.runtime.spec import from_spec
from tests.unit.runtime.examples import GELU, SILU, Dense

BOTH = pytest.mark.parametrize("dispatch", ["auto", "grouped"])


class Fixed(Router):
    """A router that always answers with one selection."""

    answer: Tensor
    all_live = False

    @classmethod
    def of(cls, select: Tensor, width: int) -> Fixed:
        router = cls(torch.zeros(select.shape[-1], width, dtype=select.dtype), active=0.5)
        router.answer = select
        return router

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.reshape(-1, self.answer.shape[-1])


def fixed(dense: Dense, select: Tensor, dispatch: str) -> RoutedFFN:
    module = dense.routed()
    module.router = Fixed.of(select, dense.width)
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    return module


# ---------------------------------------------------------------------------- the dense limit


@BOTH
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_all_live_is_the_dense_layer(
    dispatch: str, gated: bool, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    dense = Dense(gated=gated, bias=bias, dropped=True, dtype=dtype)
    module = dense.routed()
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    for shape in [(1,), (7,), (2, 5), (), (0,), (3, 0)]:
        x = dense.x(*shape)
        y = module(x)
        assert y.shape == x.shape
        assert y.dtype == dtype
        if x.numel():
            assert (y - dense(x)).abs().max() <= tolerance * dense(x).abs().max()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(dispatch: str, dtype: torch.dtype) -> None:
    """The error against exact arithmetic is no larger than that of the dense half layer."""
    exact = Dense(width=32, hidden=256, experts=64, shared=0, dtype=torch.float64)
    half = Dense(width=32, hidden=256, experts=64, shared=0, dtype=dtype)
    module = half.routed()
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    x = exact.x(64).to(dtype)
    with torch.no_grad():
        y, dense = module(x), half(x)
        # the same half hidden neurons, summed exactly
        want = nn.functional.linear(half.hidden(x).double(), half.down.double())
        want += half.down_bias.double() if half.down_bias is not None else 0
    ulp = torch.finfo(dtype).eps
    assert ((y - want).abs() <= ulp * want.abs() + 1e-6).all()
    assert (y.double() - dense.double()).abs().max() <= 2 * ulp * want.abs().max()


# ---------------------------------------------------------------------------- part of it live


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.sampled_from([1, 2, 3, 6, 12, 24]),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    gated=st.booleans(),
    bias=st.booleans(),
    dropped=st.booleans(),
    grad=st.booleans(),
    dispatch=st.sampled_from(["auto", "grouped"]),
    seed=st.integers(0, 10_000),
)
def test_a_selection_equals_the_masked_dense_layer(
    tokens: int,
    experts: int,
    density: float,
    gated: bool,
    bias: bool,
    dropped: bool,
    grad: bool,
    dispatch: str,
    seed: int,
) -> None:
    dense = Dense(experts=experts, shared=0, gated=gated, bias=bias, dropped=dropped, seed=seed)
    select = (torch.rand(tokens, experts, generator=dense.g) < density).double()
    module = fixed(dense, select, dispatch)
    x = dense.x(tokens)
    with torch.set_grad_enabled(grad):
        y = module(x)
    torch.testing.assert_close(y.detach(), dense(x, select), atol=1e-12, rtol=1e-12)
    live = int(select.sum())
    assert module.counter.rows == module.counter.units_live == live
    assert module.counter.units_total == module.counter.rows_dense == tokens * experts


@BOTH
def test_one_expert_for_all_and_dead_experts(dispatch: str) -> None:
    dense = Dense(shared=0)
    select = torch.zeros(8, 6, dtype=torch.float64)
    select[:, 3] = 1
    module = fixed(dense, select, dispatch)
    x = dense.x(8)
    torch.testing.assert_close(module(x), dense(x, select))
    assert module.counter.rows == 8


def test_dead_experts_are_not_read() -> None:
    """NaN weights of dead experts do not reach the output."""
    for tokens, experts in ((1, 6), (5, 6), (1, 24), (5, 24)):
        dense = Dense(shared=0, bias=False, experts=experts)
        select = torch.zeros(tokens, experts, dtype=torch.float64)
        select[:, [1, 4]] = 1
        x = dense.x(tokens)
        module = fixed(dense, select, "auto")
        want = dense(x, select)
        with torch.no_grad():
            for packed in (module.up, module.gate, module.down):
                assert packed is not None
                packed[select[0] == 0] = torch.nan
            torch.testing.assert_close(module(x), want)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuting_experts_changes_nothing(seed: int) -> None:
    dense = Dense(shared=0, active=0.5, seed=seed)
    module = dense.routed()
    turn = torch.randperm(6, generator=dense.g)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for part in (other.up, other.gate, other.down, other.up_bias, other.gate_bias):
            assert part is not None
            part.copy_(part[turn])
        other.router.weight.copy_(other.router.weight[turn])
        other.router.bias.copy_(other.router.bias[turn])
        x = dense.x(9)
        torch.testing.assert_close(other(x), module(x), atol=1e-12, rtol=1e-12)


def test_inputs_of_any_layout() -> None:
    dense = Dense(active=0.5)
    module = dense.routed()
    x = dense.x(4, 3).transpose(0, 1)
    assert not x.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(module(x), module(x.contiguous()))
    with torch.inference_mode():
        torch.testing.assert_close(module(x[:1, :1]), module(x)[:1, :1])


# ---------------------------------------------------------------------------- training


@BOTH
def test_gradients_are_right(dispatch: str) -> None:
    dense = Dense(width=4, hidden=6, experts=3, shared=0, dropped=True)
    for tokens in (1, 3):
        select = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=torch.float64)[:tokens]
        select.requires_grad_()
        module = fixed(dense, select.detach(), dispatch)

        def run(x: Tensor, s: Tensor, *weights: Tensor, module: RoutedFFN = module) -> Tensor:
            assert isinstance(module.router, Fixed)
            module.router.answer = s
            names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias", "dropped")
            swapped = dict(zip(names, weights, strict=True))
            y: Tensor = torch.func.functional_call(module, swapped, (x,))
            return y

        x = dense.x(tokens).requires_grad_()
        named = (module.up, module.gate, module.down, module.up_bias, module.gate_bias)
        weights = [w for w in (*named, module.down_bias, module.dropped) if w is not None]
        doubles = [w.detach().clone().requires_grad_() for w in weights]
        live = select.detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, *w, live=live: run(x, live.detach(), *w), (x, *doubles)
        )
        # gradients of the weights of live pairs; a dead pair is not computed and has none
        (got,) = torch.autograd.grad(run(x, live, *doubles).sum(), live)
        probe = torch.ones_like(select).requires_grad_()
        (want,) = torch.autograd.grad((dense(x.detach(), probe)).sum(), probe)
        torch.testing.assert_close(got[live != 0], want[live.detach() != 0])
        assert (got[live == 0] == 0).all()


@pytest.mark.parametrize("active", [1.0, 0.5])
@pytest.mark.parametrize("tokens", [1, 16])
def test_training_reaches_routers_and_experts(active: float, tokens: int) -> None:
    dense = Dense(active=active, shared=1, dtype=torch.float32)
    for weight in (dense.up, dense.down):
        weight.requires_grad_()
    module = dense.routed()
    x = dense.x(tokens)
    y = module(x)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    for parameter in (module.router.weight, module.router.bias, module.up, module.down):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert module.gate is not None
    assert not module.gate.requires_grad  # as in the dense layer


@BOTH
def test_nothing_live_still_has_a_graph(dispatch: str) -> None:
    dense = Dense(shared=0, bias=False)
    dense.up.requires_grad_()
    for tokens in (0, 4):
        module = fixed(dense, torch.zeros(tokens, 6, dtype=torch.float64), dispatch)
        y = module(dense.x(tokens))
        y.sum().backward()
        assert (y == 0).all()


def test_autocast() -> None:
    dense = Dense(active=0.5, dropped=True, dtype=torch.float32)
    module = dense.routed()
    for tokens in (1, 6):
        x = dense.x(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
            module(x.bfloat16())
        torch.testing.assert_close(y, module(x), atol=0.1, rtol=0.1)
        y.sum().backward()


# ---------------------------------------------------------------------------- upcycling


def upcycled(dense: Dense, active: float, dispatch: str) -> RoutedFFN:
    router = Router(
        torch.randn(4, dense.width, dtype=dense.dtype), rule="softmax-top-k", active=active
    )
    module = RoutedFFN.from_dense(
        dense.up,
        dense.gate,
        dense.down,
        dense.up_bias,
        dense.gate_bias,
        dense.down_bias,
        experts=4,
        activation=SILU,
        router=router,
        copies=True,
    )
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    return module


@BOTH
@pytest.mark.parametrize("active", [1.0, 0.5, 0.25])
def test_copies_equal_the_dense_layer_at_any_budget(active: float, dispatch: str) -> None:
    dense = Dense()
    module = upcycled(dense, active, dispatch)
    for tokens in (1, 9):
        x = dense.x(tokens)
        with torch.no_grad():
            torch.testing.assert_close(module(x), dense(x), atol=1e-12, rtol=1e-12)
        assert module.counter.live_fraction == active
    module(dense.x(9)).sum().backward()
    assert module.router.weight.grad is not None


# ---------------------------------------------------------------------------- nn.Module


@pytest.mark.parametrize("gated", [True, False])
def test_dense_weights_invert_the_map(gated: bool) -> None:
    dense = Dense(gated=gated)
    found = dense.routed().dense_weights()
    names = ["up", "down", "up_bias", "down_bias"] + (["gate", "gate_bias"] if gated else [])
    assert sorted(found) == sorted(names)
    for name in names:
        assert torch.equal(found[name], getattr(dense, name))
    copies = upcycled(Dense(), 0.5, "auto").dense_weights()
    assert torch.equal(copies["down"], Dense().down)


def test_spec_and_state_dict_round_trip() -> None:
    for dense in (Dense(dropped=True, active=0.5), Dense(gated=False, bias=False, active=0.5)):
        module = dense.routed()
        module.pass_name, module.dispatch = "ffn-moe", "grouped"
        other = from_spec(module.spec())
        other.load_state_dict(module.state_dict())
        assert other.spec() == module.spec()
        x = dense.x(5)
        assert torch.equal(other(x), module(x))
        assert other.params() == module.params()


def test_deepcopy_and_moves() -> None:
    dense = Dense(dropped=True, active=0.5, dtype=torch.float32)
    module = dense.routed()
    x = dense.x(5)
    y = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), y)
    assert twin.counter is not module.counter
    twin.double()
    assert twin(x.double()).dtype == torch.float64
    assert twin.order is not None
    assert twin.order.dtype == torch.int64
    assert twin.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(module.train()(x), module.eval()(x))


def test_cost_follows_the_budget() -> None:
    dense = Dense(bias=False, shared=0)
    module = dense.routed()
    full, half = module.cost(1.0), module.cost(0.5)
    assert full.flops == 2 * 3 * 12 * 24
    assert full.bytes == 3 * 12 * 24 * 8
    router = 2 * 6 * 12
    assert half.flops == full.flops / 2 + router
    module.router.set_active(0.5)
    assert module.cost() == half


def test_bad_pieces_are_refused() -> None:
    dense = Dense()
    with pytest.raises(BadInput, match="do not divide"):
        RoutedFFN.from_dense(
            dense.up, None, dense.down, experts=5, activation=GELU, router=dense.router
        )
    with pytest.raises(BadInput, match="takes 2 values"):
        RoutedFFN.from_dense(
            dense.up, None, dense.down, experts=6, activation=SILU, router=dense.router
        )
    with pytest.raises(BadInput, match="cannot route"):
        RoutedFFN.from_dense(
            dense.up, None, dense.down, experts=8, activation=GELU, router=dense.router
        )
    with pytest.raises(BadInput, match="sum to one"):
        RoutedFFN.from_dense(
            dense.up, None, dense.down, experts=6, activation=GELU, router=dense.router, copies=True
        )
