"""Experts in few bits: codes, what is stored of them, and the layer that reads them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.codes import (
    WIDTHS,
    pack,
    packed_bytes,
    quantised,
    top_code,
    unpack,
    weights_of,
)
from sparsify.runtime.few_bits import FewBitsFFN
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.spec import from_spec
from tests.unit.runtime.examples import Dense

BITS = (2, 8, 3, 5, 4, 7)


def made(dense: Dense, bits: tuple[int, ...] = BITS) -> tuple[FewBitsFFN, RoutedFFN]:
    """A layer in few bits, and the same weights stored as they are."""
    parts = dense.routed()
    few = FewBitsFFN.of(parts, bits, 4)
    whole = RoutedFFN(
        few.up, few.gate, few.down, parts.up_bias, parts.gate_bias, parts.down_bias,
        activation=parts.activation, router=parts.router, dropped=parts.dropped, order=parts.order,
    )  # fmt: skip
    return few, whole


def weight(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99))
def test_codes_are_packed_without_gaps(bits: int, count: int, rows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    most = top_code(bits)
    codes = torch.randint(-most, most + 1, (rows, count), generator=g).to(torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(count, bits))
    assert packed_bytes(count, bits) <= (count + 7) * bits / 8
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_errors_are_half_a_scale_or_clipped(bits: int) -> None:
    w = weight(bits, 6, 64)
    codes, scales = quantised(w, bits, 16)
    assert int(codes.abs().max()) <= top_code(bits)
    found = weights_of(codes, scales, torch.float32)
    scale = scales.float().repeat_interleave(16, 1)
    clipped = w.abs() > top_code(bits) * scale
    assert ((found - w).abs()[~clipped] <= scale[~clipped] * 0.5001).all()
    assert (found[clipped].abs() == top_code(bits) * scale[clipped]).all()
    assert (found - w).abs().max() < 0.45 * w.abs().max()


def test_every_bit_is_worth_about_a_factor_of_four() -> None:
    w = weight(0, 32, 64)
    errors = [
        float((weights_of(*quantised(w, b, 64), w.dtype) - w).square().mean()) for b in WIDTHS
    ]
    assert all(2.5 < a / b < 7 for a, b in itertools.pairwise(errors)), errors


def test_clipping_heeds_what_counts() -> None:
    w = torch.ones(1, 8)
    w[0, 0] = 20.0
    counts = torch.tensor([[1e-6] + [1.0] * 7])
    heeding = weights_of(*quantised(w, 3, 8, counts), w.dtype)
    plain = weights_of(*quantised(w, 3, 8), w.dtype)
    assert (heeding - w)[0, 1:].abs().sum() <= (plain - w)[0, 1:].abs().sum()
    assert weights_of(*quantised(torch.zeros(1, 8), 4, 8), w.dtype).abs().sum() == 0


@pytest.mark.parametrize("dispatch", ["auto", "grouped", "masked"])
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 30), st.sampled_from([0.4, 0.7, 1.0]), st.booleans(), st.booleans())
def test_it_is_the_layer_of_its_weights(
    dispatch: str, tokens: int, active: float, gated: bool, dropped: bool
) -> None:
    dense = Dense(active=active, gated=gated, dropped=dropped)
    few, whole = made(dense)
    few.dispatch = dispatch  # type: ignore[assignment]
    x = dense.x(tokens)
    with torch.no_grad():
        torch.testing.assert_close(few(x), whole(x))
    work = few.counter
    assert (work.tokens, work.units_live) == (whole.counter.tokens, whole.counter.units_live)


def test_it_is_near_the_dense_layer_and_nearer_with_more_bits() -> None:
    dense = Dense(width=16, hidden=48)
    x = dense.x(50)
    want, errors = dense(x), []
    for bits in WIDTHS:
        few, _ = made(dense, (bits,) * 6)
        with torch.no_grad():
            errors.append(float((few(x) - want).square().mean() / want.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


def test_only_live_experts_are_made() -> None:
    few, _ = made(dense := Dense(active=0.4))
    x, seen = dense.x(1), []
    usual = few.weights

    def weights(role: str, start: int = 0, size: int | None = None) -> Tensor:
        seen.append(few.experts if size is None else size)
        return usual(role, start, size)

    few.weights = weights  # type: ignore[method-assign]
    with torch.no_grad():
        few(x)
    assert sum(seen) == 3 * few.counter.units_live


def test_memory_is_what_the_bits_say() -> None:
    few, whole = made(Dense(dtype=torch.float32))
    codes = sum(packed_bytes(4 * 12, b) for b in BITS)
    held = sum(p.numel() * p.element_size() for n, p in few.named_parameters() if "_" in n)
    others = sum(
        b.numel() * 4 for b in (few.up_bias, few.gate_bias, few.down_bias) if b is not None
    )
    assert held - others == 3 * (codes + 2 * 6 * 4 * 12 // 4)
    assert sum(map(few.bytes_of, range(6))) == held - others
    assert few.mean_bits == 8 * (held - others) / (3 * 6 * 4 * 12)
    assert few.cost(1.0).flops == whole.cost(1.0).flops
    saved = whole.cost(0.5).bytes - few.cost(0.5).bytes
    assert saved == pytest.approx(3 * 3 * 4 * 12 * (4 - few.mean_bits / 8))


def test_spec_round_trip_and_casts() -> None:
    few, _ = made(dense := Dense(active=0.5))
    x = dense.x(9)
    again = from_spec(few.spec())
    assert isinstance(again, FewBitsFFN)
    again.load_state_dict(few.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), few(x))
        assert again.spec() == few.spec()
        scales = few.up_scales.clone()
        half = few.to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.up_scales, scales)


def test_dense_weights_are_the_rounded_ones() -> None:
    dense = Dense()
    few, whole = made(dense)
    want = whole.dense_weights()
    assert all(torch.equal(t, want[role]) for role, t in few.dense_weights().items())
    assert (few.dense_weights()["up"] - dense.up).abs().max() > 0


def test_gradients_reach_input_and_router() -> None:
    few, _ = made(dense := Dense(active=0.5))
    x = dense.x(6).requires_grad_()
    few(x).square().sum().backward()
    assert x.grad is not None and few.router.weight.grad is not None
    assert all(p.grad is None for n, p in few.named_parameters() if n.endswith("_codes"))


def test_bad_arguments() -> None:
    parts = Dense().routed()
    with pytest.raises(BadInput, match="bits"):
        FewBitsFFN.of(parts, (4,) * 5, 4)
    with pytest.raises(BadInput, match="bits"):
        FewBitsFFN.of(parts, (9,) * 6, 4)
    with pytest.raises(BadInput, match="groups of 5"):
        FewBitsFFN.of(parts, BITS, 5)
