"""Kernels of :mod:`sparsify.codegen.triton.columns`."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.codegen.triton.groups import append


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
        found = append(index + tile * units, h, used, found)
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
