"""rows_gemm: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


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


SIGNATURE = {
    'x': '*bf16',
    'blocks': '*bf16',
    'bias': '*bf16',
    'places': '*i64',
    'order': '*i32',
    'count': '*i32',
    'y': '*bf16',
    'tokens': 'i32',
    'inputs': 'i32',
    'rows': 'i32',
    'stride_x': 'i32',
    'stride_y': 'i32',
}
CONSTANTS = {
    'BIAS': True,
    'PLACES': False,
    'BLOCK_T': 64,
    'BLOCK_R': 64,
    'BLOCK_K': 32,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 3}
