"""Kernels of :mod:`sparsify.codegen.triton.linear`."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.codegen.triton.groups import append


@triton.jit
def linear_gemv(
    x,  # (in,)
    columns,  # (in, out)
    scale,  # (in,) float32
    centre,  # (in,) where CENTRED
    part,  # (SPLIT, out) float32
    pairs,  # (SPLIT,) int32: live features of each part
    inputs,
    outputs,
    threshold,
    CENTRED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One token, one block of outputs, one part of the inputs; dead rows are not loaded."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    out = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    span = tl.cdiv(tl.cdiv(inputs, SPLIT), BLOCK_K) * BLOCK_K
    stop = tl.minimum(split * span + span, inputs)
    total = tl.zeros((BLOCK_K, BLOCK_OUT), tl.float32)
    seen = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(split * span, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + k, mask=k < stop, other=0.0)
        if CENTRED:
            value = value - tl.load(centre + k, mask=k < stop, other=0.0).to(value.dtype)
        wide = value.to(tl.float32)
        score = tl.abs(wide) * tl.load(scale + k, mask=k < stop, other=0.0)
        live = (score > threshold) & (k < stop)
        seen += live.to(tl.int32)
        weight = tl.load(
            columns + k[:, None].to(tl.int64) * outputs + out[None, :],
            mask=live[:, None] & (out < outputs)[None, :],
            other=0.0,
        )
        total += tl.where(live, wide, 0.0)[:, None] * weight.to(tl.float32)
    tl.store(part + split * outputs + out, tl.sum(total, 0), mask=out < outputs)
    if block == 0:
        tl.store(pairs + split, tl.sum(seen, 0))


@triton.jit
def linear_live(
    x,  # (T, in)
    scale,
    centre,
    index,  # (tiles, in) int32: features live for some token of the tile, ascending
    count,  # (tiles, 2) int32: how many, and live (token, feature) pairs
    tokens,
    inputs,
    stride_x,
    threshold,
    CENTRED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of tokens: the list of the features that any of them uses."""
    tile = tl.program_id(0)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    found = 0
    pairs = 0
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (t < tokens)[:, None] & (k < inputs)[None, :]
        value = tl.load(x + t[:, None].to(tl.int64) * stride_x + k[None, :], mask=inside, other=0.0)
        if CENTRED:
            middle = tl.load(centre + k, mask=k < inputs, other=0.0).to(value.dtype)
            value = value - middle[None, :]
        weight = tl.load(scale + k, mask=k < inputs, other=0.0)
        live = ((tl.abs(value.to(tl.float32)) * weight[None, :] > threshold) & inside).to(tl.int32)
        used = tl.max(live, 0)
        found = append(index + tile.to(tl.int64) * inputs, k, used, found)
        pairs += tl.sum(tl.sum(live, 1), 0)
    tl.store(count + 2 * tile, found)
    tl.store(count + 2 * tile + 1, pairs)


@triton.jit
def linear_gemm(
    x,  # (T, in)
    columns,  # (in, out)
    scale,
    centre,
    offset,  # (out,) where OFFSET and SPLIT == 1
    bias,  # (out,) where BIAS and SPLIT == 1
    index,  # (tiles, in) int32
    count,  # (tiles, 2) int32
    y,  # (T, out); (SPLIT, T, out) float32 where SPLIT > 1
    tokens,
    inputs,
    outputs,
    stride_x,
    threshold,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of tokens times one block of outputs, over a part of the tile's live features."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    split = tl.program_id(2)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    out = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    found = tl.load(count + 2 * tile)
    span = tl.cdiv(tl.cdiv(found, SPLIT), BLOCK_K) * BLOCK_K
    stop = tl.minimum(split * span + span, found)
    total = tl.zeros((BLOCK_T, BLOCK_OUT), tl.float32)
    for start in range(split * span, stop, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        listed = at < stop
        k = tl.load(index + tile.to(tl.int64) * inputs + at, mask=listed, other=0)
        inside = (t < tokens)[:, None] & listed[None, :]
        value = tl.load(x + t[:, None].to(tl.int64) * stride_x + k[None, :], mask=inside, other=0.0)
        if CENTRED:
            middle = tl.load(centre + k, mask=listed, other=0.0).to(value.dtype)
            value = value - middle[None, :]
        weight = tl.load(scale + k, mask=listed, other=0.0)
        live = (tl.abs(value.to(tl.float32)) * weight[None, :] > threshold) & inside
        right = tl.load(
            columns + k[:, None].to(tl.int64) * outputs + out[None, :],
            mask=listed[:, None] & (out < outputs)[None, :],
            other=0.0,
        )
        left = tl.where(live, value, 0.0).to(right.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if SPLIT == 1:
        if OFFSET:
            total += tl.load(offset + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            total += tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)[None, :]
    row = split * tokens.to(tl.int64) + t
    tl.store(
        y + row[:, None] * outputs + out[None, :],
        total.to(y.dtype.element_ty),
        mask=(t < tokens)[:, None] & (out < outputs)[None, :],
    )
