"""linear_gemv: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


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


SIGNATURE = {
    'x': '*bf16',
    'columns': '*bf16',
    'scale': '*fp32',
    'centre': '*bf16',
    'part': '*fp32',
    'pairs': '*i32',
    'inputs': 'i32',
    'outputs': 'i32',
    'threshold': 'fp32',
}
CONSTANTS = {
    'CENTRED': True,
    'SPLIT': 4,
    'BLOCK_K': 32,
    'BLOCK_OUT': 128,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
