"""split_sum: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def split_sum(
    part,  # (SPLIT, T, out) float32
    offset,
    bias,
    y,  # (T, out)
    total,  # T * out
    outputs,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of a sum, added in order, with what is added to every row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        value += tl.load(part + split * total.to(tl.int64) + at, mask=at < total, other=0.0)
    if OFFSET:
        value += tl.load(offset + at % outputs, mask=at < total, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at % outputs, mask=at < total, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < total)


SIGNATURE = {
    'part': '*fp32',
    'offset': '*bf16',
    'bias': '*bf16',
    'y': '*bf16',
    'total': 'i32',
    'outputs': 'i32',
}
CONSTANTS = {
    'OFFSET': True,
    'BIAS': True,
    'SPLIT': 8,
    'BLOCK': 512,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
