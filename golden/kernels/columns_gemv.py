"""columns_gemv: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


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


SIGNATURE = {
    'z': '*bf16',
    'select': '*fp32',
    'blocks': '*bf16',
    'dropped': '*bf16',
    'places': '*i64',
    'part': '*fp32',
    'units': 'i32',
    'width': 'i32',
    'outputs': 'i32',
    'stride_unit': 'i32',
}
CONSTANTS = {
    'DROPPED': True,
    'PLACES': False,
    'SPLIT': 4,
    'BLOCK_K': 32,
    'BLOCK_OUT': 128,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
