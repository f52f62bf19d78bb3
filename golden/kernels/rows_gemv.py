"""rows_gemv: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


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


SIGNATURE = {
    'x': '*bf16',
    'blocks': '*bf16',
    'bias': '*bf16',
    'places': '*i64',
    'select': '*fp32',
    'y': '*bf16',
    'inputs': 'i32',
    'rows': 'i32',
    'stride_unit': 'i32',
}
CONSTANTS = {
    'BIAS': True,
    'PLACES': False,
    'BLOCK_R': 8,
    'BLOCK_K': 256,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
