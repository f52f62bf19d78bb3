"""``sparsify::route``: scores and selection of a router in one kernel.

For rules whose live units weigh one: ``top-k`` and ``threshold``. A program scores a block of
tokens, ``x @ weight.T + bias`` (rounded to the dtype of x, as eager's product is), and selects in
registers. The k-th largest score is found bit by bit: scores become integers of the same order, and
32 counts of "how many are at least this" narrow it down whatever k is; ties go to the lower unit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.routing import fuses, undisturbed
from sparsify.codegen.triton.host import check_tensor, precision, tile, token_tile
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample
from sparsify.runtime.router import Router


@triton.jit
def route_tokens(
    x,  # (T, D), strides xt and xd
    weight,  # (R, D)
    bias,  # (R,)
    order,  # (S + R,) int64 where ORDERED
    select,  # (T, S + R) out
    tokens,
    keep,  # routed units of a token, where COUNTS
    threshold,  # else those above it
    xt,
    xd,
    COUNTS: tl.constexpr,
    ORDERED: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The selection of a block of tokens: 1 where live, else 0."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = (t < tokens)[:, None] & (k < D)[None, :]
        right = (r < R)[None, :] & (k < D)[:, None]
        at = t.to(tl.int64)[:, None] * xt + k[None, :] * xd
        a = tl.load(x + at, mask=left, other=0.0)
        w = tl.load(weight + r[None, :] * D + k[:, None], mask=right, other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    total += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    score = total.to(x.dtype.element_ty).to(tl.float32) + 0.0  # no negative zero
    if COUNTS:
        bits = score.to(tl.int32, bitcast=True)
        # NaN ranks above infinity, as in torch.sort; units that are not there below everything.
        bits = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
        key = tl.where((r < R)[None, :], bits.to(tl.int64) + 2147483649, 0)  # 1 and up
        cut = tl.zeros((BLOCK_T,), tl.int64)
        step = tl.full((BLOCK_T,), 4294967296, tl.int64)
        for _ in range(33):
            more = tl.sum((key >= (cut + step)[:, None]).to(tl.int32), 1) >= keep
            cut = tl.where(more, cut + step, cut)
            step = step // 2
        above = (key > cut[:, None]).to(tl.int32)
        tied = (key == cut[:, None]).to(tl.int32)
        room = keep - tl.sum(above, 1)
        first = tied * (tl.cumsum(tied, 1) <= room[:, None]).to(tl.int32)
        live = (above + first) > 0
    else:
        live = score > threshold
    if ORDERED:
        column = tl.load(order + S + r, mask=r < R, other=0).to(tl.int32)
    else:
        column = S + r
    row = t.to(tl.int64)[:, None] * (S + R)
    inside = (t < tokens)[:, None] & (r < R)[None, :]
    value = tl.where(live, 1.0, 0.0).to(select.dtype.element_ty)
    tl.store(select + row + column[None, :], value, mask=inside)
    for s in range(S):
        if ORDERED:
            place = tl.load(order + s).to(tl.int32)
        else:
            place = s
        one = tl.full((BLOCK_T,), 1.0, select.dtype.element_ty)
        tl.store(select + t.to(tl.int64) * (S + R) + place, one, mask=t < tokens)


@torch.library.custom_op("sparsify::route", mutates_args=())
def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor | None,
    shared: int,
    keep: int,
    threshold: float,
) -> Tensor:
    """x (T, D), any strides -> select (T, S + R) in its dtype: 1 where live, else 0.

    Args:
        weight: (R, D); bias: (R,); order: (S + R,), the column of every unit.
        keep: routed units of a token; negative = those whose score is above ``threshold``.
    """
    check_tensor(x)
    tokens, (routed, width) = len(x), weight.shape
    select = torch.empty((tokens, shared + routed), dtype=x.dtype, device=x.device)
    if not tokens:
        return select
    block = min(token_tile(tokens), 16)  # 32 spill registers on gfx942
    route_tokens[(triton.cdiv(tokens, block),)](
        x, weight, bias, order, select, tokens, keep, threshold, x.stride(0), x.stride(1),
        COUNTS=keep >= 0, ORDERED=order is not None, S=shared, R=routed, D=width, BLOCK_T=block,
        BLOCK_R=tile(routed, 256), BLOCK_K=32, PRECISION=precision(x),
    )  # fmt: skip
    return select


@route.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, order: Any, shared: int, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], shared + weight.shape[0]))


def can_route(router: Router) -> bool:
    """Whether the kernel does what ``router`` does, in inference."""
    quiet = fuses(router) and undisturbed(router) and not router.training
    return quiet and 0 < router.routed <= 256


def selection(router: Router, x: Tensor) -> Tensor:
    """x (..., D) -> select (T, N)."""
    cuts = router.selector.mean
    keep = -1 if cuts else int(router.budget)
    threshold = router.threshold if cuts else math.inf
    assert isinstance(threshold, float)
    rows = x.reshape(-1, x.shape[-1])
    tensors = (router.weight, router.bias, router.order)
    found: Tensor = route(rows, *tensors, router.shared, keep, threshold)
    return found


# ---------------------------------------------------------------------------- specs


def _sample(routed: int) -> Sample:
    """Half of the routed units, at 32 tokens of width 1024."""
    x = torch.zeros(32, 1024, dtype=torch.float16)
    weight, bias = x.new_zeros(routed, 1024), x.new_zeros(routed)
    least = (x.numel() + weight.numel() + routed + len(x) * routed) * 2
    return Sample(lambda: route(x, weight, bias, None, 0, routed // 2, math.inf), least)


def _spec(routed: int) -> KernelSpec:
    """Specialised for so many routed units; 48 of them with 16 shared ones, which have an order."""
    name = "route_tokens" if routed == 48 else f"route_tokens_{routed}"
    return KernelSpec(
        name,
        route_tokens,
        dict.fromkeys(("x", "weight", "bias"), "*bf16")
        | {"order": "*i64", "select": "*bf16", "tokens": "i32", "keep": "i32"}
        | {"threshold": "fp32", "xt": "i32"},
        {
            "xd": 1,
            "COUNTS": True,
            "ORDERED": routed == 48,
            "S": 16 if routed == 48 else 0,
            "R": routed,
        }
        | {"D": 2048, "BLOCK_T": 16, "BLOCK_R": tile(routed, 256), "BLOCK_K": 32}
        | {"PRECISION": "tf32"},
        aligned=("xt",),
        gemm=True,
        sample=lambda: _sample(routed),
    )


SPECS: tuple[KernelSpec, ...] = tuple(_spec(routed) for routed in (8, 48, 64, 256))
