"""attend_join: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def attend_join(
    sums,  # (SPLIT, B * H, dv) float32
    tops,  # (SPLIT, B * H, 2) float32
    select,  # (B, H)
    y,  # (B * H, dv)
    heads,
    stride_lb,
    stride_lh,
    SAFE: tl.constexpr,
    SPLIT: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One head's parts, each scaled to the largest score of all; zeros for a dead head."""
    pair = tl.program_id(0)
    rows = tl.num_programs(0)
    chosen = tl.load(select + (pair // heads) * stride_lb + (pair % heads) * stride_lh)
    e = tl.arange(0, BLOCK_V)
    parts = tl.where(chosen != 0, SPLIT, 0)
    most = float("-inf")
    for split in range(parts):
        most = tl.maximum(most, tl.load(tops + 2 * (split * rows + pair)))
    base = tl.where(most == float("-inf"), 0.0, most)
    norm = 0.0
    total = tl.zeros((BLOCK_V,), tl.float32)
    for split in range(parts):
        place = split * rows + pair
        fade = tl.exp(tl.load(tops + 2 * place) - base)
        norm += fade * tl.load(tops + 2 * place + 1)
        total += fade * tl.load(sums + place * VALUE + e, mask=e < VALUE, other=0.0)
    empty = (chosen == 0) | SAFE
    result = total / tl.where(empty & (norm == 0.0), 1.0, norm)
    tl.store(y + pair * VALUE + e, result.to(y.dtype.element_ty), mask=e < VALUE)


SIGNATURE = {
    'sums': '*fp32',
    'tops': '*fp32',
    'select': '*fp32',
    'y': '*bf16',
    'heads': 'i32',
    'stride_lb': 'i32',
    'stride_lh': 'i32',
}
CONSTANTS = {
    'SAFE': True,
    'SPLIT': 8,
    'VALUE': 128,
    'BLOCK_V': 128,
}
LAUNCH = {'num_warps': 1, 'num_stages': 2}
