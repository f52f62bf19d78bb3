"""Routed projections by units: live blocks of output rows, live blocks of input columns.

Rows (:class:`sparsify.runtime.heads.RoutedRows`): tokens are grouped by unit on the device
(:func:`group_tokens`, no sync), live ones first; a tile of a unit's live tokens is one matrix
product, a tile of dead ones only stores zeros, so every output is written once. Columns
(:class:`sparsify.runtime.heads.RoutedColumns`): the units that are live for some token of a tile
are listed, and the product runs over their columns. A unit that nobody in a tile uses is neither
read nor multiplied. One token takes the matrix-vector forms, which read live units only.

Backward is eager, unit weights masked (see :mod:`sparsify.codegen.triton.linear`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.host import PROGRAMS, precision, rowwise, splits, token_tile
from sparsify.codegen.triton.parts import add_parts
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample
from sparsify.runtime.heads import RoutedColumns, RoutedRows


@triton.jit
def group_tokens(
    select,  # (rows, tokens, units), zero where dead
    order,  # (rows * units, tokens) int32: live tokens ascending, then dead ones descending
    count,  # (rows * units,) int32: live tokens
    units,
    tokens,
    stride_row,
    stride_token,
    stride_unit,
    BLOCK: tl.constexpr,
):
    """The tokens of one unit (of one batch row), live ones first."""
    pair = tl.program_id(0)
    base = select + (pair // units).to(tl.int64) * stride_row + (pair % units) * stride_unit
    live = 0
    dead = 0
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < tokens
        chosen = tl.load(base + t.to(tl.int64) * stride_token, mask=inside, other=0)
        yes = ((chosen != 0) & inside).to(tl.int32)
        no = inside.to(tl.int32) - yes
        front = live + tl.cumsum(yes, 0) - yes
        back = tokens - 1 - (dead + tl.cumsum(no, 0) - no)
        place = tl.where(yes > 0, front, back)
        tl.store(order + pair.to(tl.int64) * tokens + place, t, mask=inside)
        live += tl.sum(yes, 0)
        dead += tl.sum(no, 0)
    tl.store(count + pair, live)


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


@triton.jit
def columns_live(
    select,  # (T, H)
    index,  # (tiles, H) int32: units live for some token of the tile
    count,  # (tiles,) int32
    tokens,
    units,
    stride_token,
    stride_unit,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of tokens: the list of the units that any of them uses."""
    tile = tl.program_id(0)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    found = 0
    for start in range(0, units, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = (t < tokens)[:, None] & (h < units)[None, :]
        chosen = tl.load(
            select + t[:, None].to(tl.int64) * stride_token + h[None, :] * stride_unit,
            mask=inside,
            other=0,
        )
        used = tl.max(((chosen != 0) & inside).to(tl.int32), 0)
        place = found + tl.cumsum(used, 0) - used
        tl.store(index + tile * units + place, h, mask=used > 0)
        found += tl.sum(used, 0)
    tl.store(count + tile, found)


@triton.jit
def columns_gemm(
    z,  # (T, in)
    select,  # (T, H) weights, zero where dead
    blocks,  # (H * c, out)
    bias,  # (out,) where BIAS
    dropped,  # (H, out) where DROPPED
    places,  # (H * c,) int64 where PLACES: input feature of a packed column
    index,  # (tiles, H)
    count,  # (tiles,)
    y,  # (T, out); (SPLIT, T, out) float32 where SPLIT > 1
    tokens,
    units,
    width,
    outputs,
    stride_z,
    stride_token,
    stride_unit,
    BIAS: tl.constexpr,
    DROPPED: tl.constexpr,
    PLACES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of tokens times a block of outputs, over the columns of its live units."""
    tile = tl.program_id(0)
    split = tl.program_id(2)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    found = tl.load(count + tile) * width
    span = tl.cdiv(tl.cdiv(found, SPLIT), BLOCK_K) * BLOCK_K
    stop = tl.minimum(split * span + span, found)
    total = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    token = t[:, None].to(tl.int64)
    for start in range(split * span, stop, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        listed = at < stop
        unit = tl.load(index + tile * units + at // width, mask=listed, other=0)
        column = unit * width + at % width
        feature = column
        if PLACES:
            feature = tl.load(places + column, mask=listed, other=0).to(tl.int32)
        inside = (t < tokens)[:, None] & listed[None, :]
        weight = tl.load(
            select + token * stride_token + unit[None, :] * stride_unit, mask=inside, other=0.0
        ).to(tl.float32)
        value = tl.load(
            z + token * stride_z + feature[None, :], mask=inside & (weight != 0), other=0.0
        )
        right = tl.load(
            blocks + column[:, None].to(tl.int64) * outputs + out[None, :],
            mask=listed[:, None] & (out < outputs)[None, :],
            other=0.0,
        )
        left = (value.to(tl.float32) * weight).to(right.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if DROPPED:
        most = tl.where(split == 0, units, 0)
        for start in range(0, most, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            inside = (t < tokens)[:, None] & (h < units)[None, :]
            weight = tl.load(
                select + token * stride_token + h[None, :] * stride_unit, mask=inside, other=1.0
            )
            right = tl.load(
                dropped + h[:, None] * outputs + out[None, :],
                mask=(h < units)[:, None] & (out < outputs)[None, :],
                other=0.0,
            )
            dead = (weight == 0).to(right.dtype)
            total = tl.dot(dead, right, total, input_precision=PRECISION)
    if BIAS and SPLIT == 1:
        total += tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
    row = split * tokens.to(tl.int64) + t
    tl.store(
        y + row[:, None] * outputs + out[None, :],
        total.to(y.dtype.element_ty),
        mask=(t < tokens)[:, None] & (out < outputs)[None, :],
    )


@triton.jit
def columns_gemv(
    z,  # (in,)
    select,  # (H,)
    blocks,  # (H * c, out)
    dropped,
    places,
    part,  # (SPLIT, out) float32
    units,
    width,
    outputs,
    stride_unit,
    DROPPED: tl.constexpr,
    PLACES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One token, a block of outputs, every SPLIT-th block of columns; dead ones are not read."""
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_K, BLOCK_OUT), tl.float32)
    left = tl.zeros((BLOCK_OUT,), tl.float32)  # what stands in for dead units
    for start in range(split * BLOCK_K, units * width, SPLIT * BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < units * width
        unit = column // width
        weight = tl.load(select + unit * stride_unit, mask=inside, other=0.0).to(tl.float32)
        live = weight != 0
        feature = column
        if PLACES:
            feature = tl.load(places + column, mask=live, other=0).to(tl.int32)
        value = tl.load(z + feature, mask=live, other=0.0).to(tl.float32)
        right = tl.load(
            blocks + column[:, None].to(tl.int64) * outputs + out[None, :],
            mask=live[:, None] & (out < outputs)[None, :],
            other=0.0,
        )
        total += (value * weight)[:, None] * right.to(tl.float32)
    if DROPPED:
        for unit in range(split, units, SPLIT):
            dead = tl.load(select + unit * stride_unit) == 0
            extra = tl.load(
                dropped + unit * outputs + out, mask=out < tl.where(dead, outputs, 0), other=0.0
            )
            left += extra.to(tl.float32)
    tl.store(part + split * outputs + out, tl.sum(total, 0) + left, mask=out < outputs)


def grouped(select: Tensor) -> tuple[Tensor, Tensor]:
    """select (rows, T, H) -> order int32 (rows * H, T), count int32 (rows * H,)."""
    rows, tokens, units = select.shape
    order = torch.empty(rows * units, tokens, dtype=torch.int32, device=select.device)
    count = torch.empty(rows * units, dtype=torch.int32, device=select.device)
    group_tokens[(rows * units,)](
        bytes_of(select), order, count, units, tokens, *select.stride(), BLOCK=1024
    )
    return order, count


def bytes_of(mask: Tensor) -> Tensor:
    """Booleans as bytes, which kernels load; others as they are."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


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


@torch.library.custom_op("sparsify::routed_columns", mutates_args=())
def routed_columns(
    z: Tensor,
    select: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    dropped: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    """z (T, H*c), select (T, H) weights, blocks (H, c, out) -> (T, out)."""
    z, blocks = rowwise(z), blocks.contiguous()
    tokens, (units, width, outputs) = len(z), blocks.shape
    y = z.new_empty(tokens, outputs)
    if not tokens:
        return y
    where, still = y if places is None else places, y if dropped is None else dropped
    chosen = select.to(z.dtype) if select.dtype == torch.bool else select
    flags = {"DROPPED": dropped is not None, "PLACES": places is not None}
    if tokens == 1:
        blocks_out = triton.cdiv(outputs, 128)
        split = splits(blocks_out, units * width, 1)
        part = z.new_empty(split, 1, outputs, dtype=torch.float32)
        columns_gemv[(blocks_out, split)](
            z, chosen, blocks, still, where, part, units, width, outputs, chosen.stride(1),
            SPLIT=split, BLOCK_K=32, BLOCK_OUT=128, num_warps=4, num_stages=2, **flags,
        )  # fmt: skip
        return add_parts(part, None, bias, y)
    tile = token_tile(tokens)
    tiles = triton.cdiv(tokens, tile)
    index = torch.empty(tiles, units, dtype=torch.int32, device=z.device)
    count = torch.empty(tiles, dtype=torch.int32, device=z.device)
    columns_live[(tiles,)](
        chosen, index, count, tokens, units, *chosen.stride(), BLOCK_T=tile, BLOCK_H=32
    )
    size, depth = (64, 64) if tile < 64 else (128, 32)
    blocks_out = triton.cdiv(outputs, size)
    split = splits(tiles * blocks_out, units * width, tokens)
    shape = (tokens, outputs) if split == 1 else (split, tokens, outputs)
    part = y if split == 1 else z.new_empty(shape, dtype=torch.float32)
    columns_gemm[(tiles, blocks_out, split)](
        z, chosen, blocks, y if bias is None else bias, still, where, index, count, part,
        tokens, units, width, outputs, z.stride(0), *chosen.stride(),
        BIAS=bias is not None, SPLIT=split, BLOCK_T=tile, BLOCK_K=depth, BLOCK_OUT=size,
        BLOCK_H=16, PRECISION=precision(z), num_warps=4, num_stages=3, **flags,
    )  # fmt: skip
    return y if split == 1 else add_parts(part, None, bias, y)


@routed_columns.register_fake
def _(
    z: Tensor,
    select: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    dropped: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    return z.new_empty(z.shape[0], blocks.shape[2])


def _save_columns(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, select, blocks, bias, dropped, places = inputs
    ctx.save_for_backward(z, select, blocks, places)
    ctx.has = bias is not None, dropped is not None


def _columns_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, select, blocks, places = ctx.saved_tensors
    packed = (z if places is None else z.index_select(1, places)).view(len(z), *blocks.shape[:2])
    weight = select.to(z.dtype)[:, :, None]
    left = (packed * weight).flatten(1)
    back = (g @ blocks.flatten(0, 1).t()).view(packed.shape)
    dz = (back * weight).flatten(1)
    if places is not None:
        dz = torch.zeros_like(dz).index_copy(1, places, dz)
    dselect = None
    if select.is_floating_point():
        dselect = ((back * packed).sum(2) * (select != 0)).to(select.dtype)
    biased, replaced = ctx.has
    dropped = (select == 0).to(g.dtype).t() @ g if replaced else None
    dblocks = (left.t() @ g).view(blocks.shape)
    return dz, dselect, dblocks, g.sum(0) if biased else None, dropped, None


routed_columns.register_autograd(_columns_backward, setup_context=_save_columns)


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


class ColumnsKernel:
    """The kernel of a :class:`RoutedColumns`."""

    specs = ("columns_live", "columns_gemm", "columns_gemv", "split_sum")

    def __call__(self, module: RoutedColumns, *inputs: Tensor) -> Tensor | None:
        """z (..., in), select (..., H) -> (..., out)."""
        z, select = inputs
        if z.dtype != module.blocks.dtype or z.numel() == 0:
            return None
        units, width, outputs = module.blocks.shape
        flat, chosen = z.reshape(-1, units * width), select.reshape(-1, units)
        live = int((chosen != 0).sum())
        module.counter.seen(len(flat), units, live)
        module.counter.rows += live
        y = routed_columns(flat, chosen, module.blocks, module.bias, module.dropped, module.places)
        result: Tensor = y.view(*z.shape[:-1], outputs)
        return result


def lower(module: RoutedRows | RoutedColumns) -> RowsKernel | ColumnsKernel:
    """The module's kernel."""
    return RowsKernel() if isinstance(module, RoutedRows) else ColumnsKernel()


# ---------------------------------------------------------------------------- specs


def _rows_sample(tokens: int) -> Sample:
    """Every second head of 16 is live, the same for all tokens."""
    select = torch.zeros(tokens, 16)
    select[:, ::2] = 1
    x = torch.zeros(tokens, 1024, dtype=torch.float16)
    blocks = torch.zeros(16, 64, 1024, dtype=torch.float16)
    least = x.numel() * 2 + select.numel() * 4 + 8 * 64 * 1024 * 2 + tokens * 1024 * 2
    return Sample(lambda: routed_rows(x, select, blocks, None, None), least)


def _columns_sample(tokens: int) -> Sample:
    select = torch.zeros(tokens, 32)
    select[:, ::2] = 1
    z = torch.zeros(tokens, 2048, dtype=torch.float16)
    blocks = torch.zeros(32, 64, 1024, dtype=torch.float16)
    # live columns of z, the selection, live blocks, the result
    least = z.numel() + select.numel() * 4 + 16 * 64 * 1024 * 2 + tokens * 1024 * 2
    return Sample(lambda: routed_columns(z, select, blocks, None, None, None), least)


def _types(*names: str) -> dict[str, str]:
    known = {
        "select": "*fp32",
        "order": "*i32",
        "count": "*i32",
        "index": "*i32",
        "places": "*i64",
        "part": "*fp32",
    }
    pointers = ("x", "z", "blocks", "bias", "dropped", "y")
    return {n: known.get(n, "*bf16" if n in pointers else "i32") for n in names}


SPECS = (
    KernelSpec(
        "group_tokens",
        group_tokens,
        _types(
            "select", "order", "count", "units", "tokens", "stride_row", "stride_token",
            "stride_unit",
        ),
        {"BLOCK": 1024},
    ),
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
    KernelSpec(
        "columns_live",
        columns_live,
        _types("select", "index", "count", "tokens", "units", "stride_token", "stride_unit"),
        {"BLOCK_T": 64, "BLOCK_H": 32},
    ),
    KernelSpec(
        "columns_gemm",
        columns_gemm,
        _types(
            "z", "select", "blocks", "bias", "dropped", "places", "index", "count", "y", "tokens",
            "units", "width", "outputs", "stride_z", "stride_token", "stride_unit",
        ),
        {
            "BIAS": True, "DROPPED": True, "PLACES": False, "SPLIT": 1, "BLOCK_T": 64,
            "BLOCK_K": 32, "BLOCK_OUT": 128, "BLOCK_H": 16, "PRECISION": "tf32",
        },
        num_stages=3,
        aligned=("width", "outputs", "stride_z"),
        gemm=True,
        sample=lambda: _columns_sample(8),
    ),
    KernelSpec(
        "columns_gemv",
        columns_gemv,
        _types(
            "z", "select", "blocks", "dropped", "places", "part", "units", "width", "outputs",
            "stride_unit",
        ),
        {"DROPPED": True, "PLACES": False, "SPLIT": 4, "BLOCK_K": 32, "BLOCK_OUT": 128},
        aligned=("width", "outputs"),
        sample=lambda: _columns_sample(1),
    ),
)  # fmt: skip
