"""columns_gemm: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


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


SIGNATURE = {
    'z': '*bf16',
    'select': '*fp32',
    'blocks': '*bf16',
    'bias': '*bf16',
    'dropped': '*bf16',
    'places': '*i64',
    'index': '*i32',
    'count': '*i32',
    'y': '*bf16',
    'tokens': 'i32',
    'units': 'i32',
    'width': 'i32',
    'outputs': 'i32',
    'stride_z': 'i32',
    'stride_token': 'i32',
    'stride_unit': 'i32',
}
CONSTANTS = {
    'BIAS': True,
    'DROPPED': True,
    'PLACES': False,
    'SPLIT': 1,
    'BLOCK_T': 64,
    'BLOCK_K': 32,
    'BLOCK_OUT': 128,
    'BLOCK_H': 16,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 3}
