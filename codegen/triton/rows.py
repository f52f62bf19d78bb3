"""Routed projections by units: live blocks of output rows.

Tokens are grouped by unit on the device (:func:`sparsify.codegen.triton.groups.group_tokens`), live
ones first; a tile of a unit's live tokens is one matrix product, a tile of dead ones only stores
zeros, so every output is written once. A unit that nobody in a tile uses is neither read nor
multiplied. One token takes the matrix-vector form, which reads live units only.

Backward is eager, unit weights masked (see :mod:`sparsify.codegen.triton.linear`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.groups import bytes_of, grouped
from sparsify.codegen.triton.host import PROGRAMS, precision, rowwise, token_tile
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample
from sparsify.runtime.heads import RoutedRows


@triton.jit
def rows_gemm(
    x,  # (T, in)
    blocks,  # (H, r, in)
    bias,  # (H, r) where BIAS
    places,  # (H * r,) int64 where PLACES: output feature of a packed row
    order,  # (H, T)
    count,  # (H,)
    y,  # (T, out)
    tokens,
    inputs,
    rows,
    stride_x,
    stride_y,
    BIAS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of one unit's tokens times a block of its rows; dead tokens get zeros."""
    tile = tl.program_id(0)
    unit = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tl.load(count + unit)
    t = tl.load(order + unit.to(tl.int64) * tokens + at, mask=at < tokens, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    stop = tl.where(tile * BLOCK_T < live, inputs, 0)  # nothing is read for a tile of dead tokens
    weights = blocks + (unit.to(tl.int64) * rows + r[None, :]) * inputs
    for start in range(0, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            x + t[:, None] * stride_x + k[None, :],
            mask=(at < live)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        right = tl.load(
            weights + k[:, None], mask=(k < inputs)[:, None] & (r < rows)[None, :], other=0.0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if BIAS:
        extra = tl.load(bias + unit * rows + r, mask=r < rows, other=0.0).to(tl.float32)
        total += tl.where((at < live)[:, None], extra[None, :], 0.0)
    feature = unit * rows + r
    if PLACES:
        feature = tl.load(places + feature, mask=r < rows, other=0).to(tl.int32)
    tl.store(
        y + t[:, None] * stride_y + feature[None, :],
        total.to(y.dtype.element_ty),
        mask=(at < tokens)[:, None] & (r < rows)[None, :],
    )


@triton.jit
def rows_gemv(
    x,  # (in,)
    blocks,  # (H, r, in)
    bias,
    places,
    select,  # (H,)
    y,  # (out,)
    inputs,
    rows,
    stride_unit,
    BIAS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token, some rows of one unit; a dead unit's are not read."""
    unit = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    alive = tl.load(select + unit * stride_unit) != 0
    stop = tl.where(alive, inputs, 0)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    weights = blocks + (unit.to(tl.int64) * rows + r[:, None]) * inputs
    for start in range(0, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)
        weight = tl.load(
            weights + k[None, :], mask=(r < rows)[:, None] & (k < inputs)[None, :], other=0.0
        )
        total += value[None, :] * weight.to(tl.float32)
    row = tl.sum(total, 1)
    if BIAS:
        extra = tl.load(bias + unit * rows + r, mask=r < tl.where(alive, rows, 0), other=0.0)
        row += extra.to(tl.float32)
    feature = unit * rows + r
    if PLACES:
        feature = tl.load(places + feature, mask=r < rows, other=0).to(tl.int32)
    tl.store(y + feature, row.to(y.dtype.element_ty), mask=r < rows)


@torch.library.custom_op("sparsify::routed_rows", mutates_args=())
def routed_rows(
    x: Tensor, select: Tensor, blocks: Tensor, bias: Tensor | None, places: Tensor | None
) -> Tensor:
    """x (T, in), select (T, H), blocks (H, r, in) -> (T, H*r), zero where dead.

    ``places`` int64 (H*r,): a permutation, where each packed row goes.
    """
    x, blocks = rowwise(x), blocks.contiguous()
    (tokens, inputs), (units, rows, _) = x.shape, blocks.shape
    y = x.new_empty(tokens, units * rows)
    if not tokens:
        return y
    chosen = bytes_of(select)
    extra, where = y if bias is None else bias, y if places is None else places
    flags = {"BIAS": bias is not None, "PLACES": places is not None}
    if tokens == 1:
        size = 16 if units * rows // 16 >= PROGRAMS // 2 else 8
        rows_gemv[(units, triton.cdiv(rows, size))](
            x, blocks, extra, where, chosen, y, inputs, rows, chosen.stride(1),
            BLOCK_R=size, BLOCK_K=256, num_warps=4, num_stages=2, **flags,
        )  # fmt: skip
        return y
    order, count = grouped(select[None])
    tile = token_tile(tokens)
    grid = (triton.cdiv(tokens, tile), units, triton.cdiv(rows, 64))
    rows_gemm[grid](
        x, blocks, extra, where, order, count, y, tokens, inputs, rows, x.stride(0), y.stride(0),
        BLOCK_T=tile, BLOCK_R=64, BLOCK_K=64 if tile < 64 else 32, PRECISION=precision(x),
        num_warps=4, num_stages=3, **flags,
    )  # fmt: skip
    return y


@routed_rows.register_fake
def _(
    x: Tensor, select: Tensor, blocks: Tensor, bias: Tensor | None, places: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], blocks.shape[0] * blocks.shape[1])


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, select, blocks, bias, places = inputs
    ctx.save_for_backward(x, select, blocks, places)
    ctx.biased = bias is not None


def _rows_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, select, blocks, places = ctx.saved_tensors
    units, rows, _ = blocks.shape
    packed = g if places is None else g.index_select(1, places)
    mine = packed.view(len(x), units, rows).masked_fill((select == 0)[:, :, None], 0.0)
    dx = mine.flatten(1) @ blocks.flatten(0, 1)
    dblocks = (mine.flatten(1).t() @ x).view(blocks.shape)
    return dx, None, dblocks, mine.sum(0) if ctx.biased else None, None


routed_rows.register_autograd(_rows_backward, setup_context=_save_rows)


class RowsKernel:
    """The kernel of a :class:`RoutedRows`."""

    specs = ("group_tokens", "rows_gemm", "rows_gemv")

    def __call__(self, module: RoutedRows, *inputs: Tensor) -> Tensor | None:
        """x (..., in), select (..., H) -> (..., out)."""
        x, select = inputs
        if x.dtype != module.blocks.dtype or x.numel() == 0:
            return None
        rows, chosen = x.reshape(-1, x.shape[-1]), select.reshape(-1, module.units)
        live = int((chosen != 0).sum())
        module.counter.seen(len(rows), module.units, live)
        module.counter.rows += live
        others, places = module.others, module.places
        if others is None:
            y = routed_rows(rows, chosen, module.blocks, module.bias, places)
        else:
            mine = routed_rows(rows, chosen, module.blocks, module.bias, None)
            rest = torch.nn.functional.linear(rows, others, module.other_bias)
            y = torch.cat([mine, rest], 1)
            if places is not None:
                y = torch.zeros_like(y).index_copy(1, places, y)
        result: Tensor = y.view(*x.shape[:-1], y.shape[1])
        return result


def lower(module: RoutedRows) -> RowsKernel:
    """The module's kernel."""
    return RowsKernel()


# ---------------------------------------------------------------------------- specs


def _rows_sample(tokens: int) -> Sample:
    """Every second head of 16 is live, the same for all tokens."""
    select = torch.zeros(tokens, 16)
    select[:, ::2] = 1
    x = torch.zeros(tokens, 1024, dtype=torch.float16)
    blocks = torch.zeros(16, 64, 1024, dtype=torch.float16)
    least = x.numel() * 2 + select.numel() * 4 + 8 * 64 * 1024 * 2 + tokens * 1024 * 2
    return Sample(lambda: routed_rows(x, select, blocks, None, None), least)


def _types(*names: str) -> dict[str, str]:
    known = {"select": "*fp32", "order": "*i32", "count": "*i32", "places": "*i64"}
    pointers = ("x", "blocks", "bias", "y")
    return {n: known.get(n, "*bf16" if n in pointers else "i32") for n in names}


SPECS = (
    KernelSpec(
        "rows_gemm",
        rows_gemm,
        _types(
            "x", "blocks", "bias", "places", "order", "count", "y", "tokens", "inputs", "rows",
            "stride_x", "stride_y",
        ),
        {
            "BIAS": True, "PLACES": False, "BLOCK_T": 64, "BLOCK_R": 64, "BLOCK_K": 32,
            "PRECISION": "tf32",
        },
        num_stages=3,
        aligned=("inputs", "rows", "stride_x", "stride_y"),
        gemm=True,
        sample=lambda: _rows_sample(16),
    ),
    KernelSpec(
        "rows_gemv",
        rows_gemv,
        _types(
            "x", "blocks", "bias", "places", "select", "y", "inputs", "rows", "stride_unit"
        ),
        {"BIAS": True, "PLACES": False, "BLOCK_R": 8, "BLOCK_K": 256},
        aligned=("inputs", "rows"),
        sample=lambda: _rows_sample(1),
    ),
)  # fmt: skip
