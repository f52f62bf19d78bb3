"""Routed attention against the dense operation, masked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime import attend
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.spec import from_spec
from tests.unit.runtime.examples import score

sdpa = torch.nn.functional.scaled_dot_product_attention
D = 8


def inputs(
    batch: int = 2,
    heads: int = 6,
    groups: int = 3,
    tokens: int = 5,
    keys: int = 7,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a selection."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((heads, tokens), (groups, keys), (groups, keys))
    q, k, v = (torch.randn(batch, *s, D, generator=g, dtype=torch.float64) for s in sizes)
    select = (torch.rand(batch, tokens, heads, generator=g) < 0.5).double()
    return q, k, v, select


def module(program: Program, heads: int, groups: int, *, causal: bool = False) -> RoutedAttend:
    return RoutedAttend(
        program, heads=heads, kv_heads=groups, head_dim=D, value_dim=D, causal=causal
    )


def check(routed: RoutedAttend, args: tuple[Tensor, ...], ref: Tensor) -> None:
    """Both dispatches, all live and in part, against ``ref``."""
    q, k, v, select, *operands = args
    for dispatch in ("auto", "grouped"):
        routed.dispatch = "grouped" if dispatch == "grouped" else "auto"
        for chosen in (torch.ones_like(select), select, torch.zeros_like(select)):
            routed.counter.reset()
            y = routed(q, k, v, chosen, *operands)
            live = chosen.transpose(1, 2).unsqueeze(-1) != 0
            want = torch.where(live, ref, 0.0)
            torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12, equal_nan=True)
            assert routed.counter.rows == routed.counter.units_live == int(chosen.sum())


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 3]),
    share=st.sampled_from([1, 2]),
    tokens=st.integers(1, 5),
    keys=st.integers(1, 6),
    causal=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_mask(
    batch: int, groups: int, share: int, tokens: int, keys: int, causal: bool, seed: int
) -> None:
    heads = groups * share
    q, k, v, select = inputs(batch, heads, groups, tokens, keys, seed)
    ref = sdpa(q, k, v, is_causal=causal, enable_gqa=True)
    check(module(score(D), heads, groups, causal=causal), (q, k, v, select), ref)


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (7,),
        (5, 7),
        (1, 7),
        (1, 1, 1, 7),
        (2, 1, 1, 7),
        (2, 1, 5, 7),
        (1, 6, 5, 7),
        (2, 6, 5, 7),
    ],
)
def test_masks_of_every_shape(kind: str, shape: tuple[int, ...]) -> None:
    q, k, v, select = inputs()
    mask = torch.randn(shape, dtype=torch.float64)
    if shape:
        mask[..., :2] = -math.inf
        mask.view(-1, 7)[0] = -math.inf  # a row that attends to nothing
    if kind == "bool":
        mask = mask > -1
    ref = sdpa(q, k, v, attn_mask=mask.expand(2, 6, 5, 7), enable_gqa=True)
    check(module(score(D, mask=kind), 6, 3), (q, k, v, select, mask), ref)


@pytest.mark.parametrize("softmax", ["aten._safe_softmax.default", "aten.softmax.int"])
def test_fully_masked_rows_are_as_in_the_dense_op(softmax: str) -> None:
    q, k, v, select = inputs()
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    mask[0, 0, 2] = -math.inf
    program = score(D, mask="float", softmax=softmax)
    full = (q @ k.repeat_interleave(2, 1).mT) / math.sqrt(D) + mask
    share = full.softmax(-1)
    if softmax == "aten._safe_softmax.default":
        share = share.nan_to_num()
    check(module(program, 6, 3), (q, k, v, select, mask), share @ v.repeat_interleave(2, 1))


def test_capped_and_cast_scores() -> None:
    """Soft caps, casts and a bias per head and query, as eager models write them."""
    q, k, v, select = inputs()
    bias = torch.randn(1, 6, 5, 7, dtype=torch.float64)
    program = Program(
        ("scores", "op0"),
        (
            Step("a", "aten.div.Tensor", (Ref("scores"), 30.0)),
            Step("b", "aten.tanh.default", (Ref("a"),)),
            Step("c", "aten.mul.Tensor", (Ref("b"), 30.0)),
            Step("d", "aten.add.Tensor", (Ref("c"), Ref("op0"))),
            Step("e", "aten.to.dtype", (Ref("d"), torch.float64)),
            Step("f", "aten.softmax.int", (Ref("e"), -1)),
        ),
        "f",
    )
    scores = torch.tanh(q @ k.repeat_interleave(2, 1).mT / 30) * 30 + bias
    ref = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    check(module(program, 6, 3), (q, k, v, select, bias), ref)


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little room for scores changes nothing, even when one head's pairs do not fit."""
    q, k, v, select = inputs()
    mask = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    ref = sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
    for room in (1, 7 * 3, 7 * 11):
        monkeypatch.setattr(attend, "ROOM", room)
        check(module(score(D, mask="float"), 6, 3), (q, k, v, select, mask), ref)


def test_dead_groups_are_not_read() -> None:
    q, k, v, select = inputs()
    select[..., 2:4] = 0
    k[:, 1] = torch.nan
    v[:, 1] = torch.nan
    y = module(score(D), 6, 3)(q, k, v, select)
    assert not y.isnan().any()


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_gradients(dispatch: str) -> None:
    q, k, v, select = inputs(1, 4, 2, 3, 3)
    mask = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    routed = module(score(D, mask="float"), 4, 2, causal=True)
    routed.dispatch = "grouped" if dispatch == "grouped" else "auto"
    args = [t.requires_grad_() for t in (q, k, v)]
    for chosen in (select, torch.ones_like(select)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, m, chosen=chosen: routed(q, k, v, chosen, m), (*args, mask)
        )
    routed(*args, torch.zeros_like(select), mask).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    q, k, v, select = (t.to(dtype) for t in inputs(keys=64))
    routed = module(score(D), 6, 3)
    ref = sdpa(q.double(), k.double(), v.double(), enable_gqa=True)
    for chosen in (select, torch.ones_like(select)):
        y = routed(q, k, v, chosen)
        assert y.dtype == dtype
        want = ref * chosen.transpose(1, 2).unsqueeze(-1)
        error = (y.double() - want).abs()
        assert (error <= torch.finfo(dtype).eps * want.abs() + 1e-6).all()


def test_spec_and_cost() -> None:
    routed = module(score(D, mask="bool"), 6, 3, causal=True)
    assert from_spec(routed.spec()).spec() == routed.spec()
    assert routed.cost(context=10).flops == 2 * 6 * 10 * 16
    assert routed.cost(context=10).cache == 3 * 10 * 16 * 4
    assert routed.cost(0.5, context=10).cache == 0.75 * 3 * 10 * 16 * 4
    with pytest.raises(BadInput, match="evenly"):
        module(score(D), 6, 4)
