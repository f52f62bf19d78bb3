"""linear_gemm: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


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


SIGNATURE = {
    'x': '*bf16',
    'columns': '*bf16',
    'scale': '*fp32',
    'centre': '*bf16',
    'offset': '*bf16',
    'bias': '*bf16',
    'index': '*i32',
    'count': '*i32',
    'y': '*bf16',
    'tokens': 'i32',
    'inputs': 'i32',
    'outputs': 'i32',
    'stride_x': 'i32',
    'threshold': 'fp32',
}
CONSTANTS = {
    'CENTRED': False,
    'OFFSET': False,
    'BIAS': True,
    'PRECISION': 'tf32',
    'SPLIT': 1,
    'BLOCK_T': 64,
    'BLOCK_K': 32,
    'BLOCK_OUT': 128,
}
LAUNCH = {'num_warps': 4, 'num_stages': 3}
