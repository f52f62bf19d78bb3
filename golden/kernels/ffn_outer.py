"""ffn_outer: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def ffn_outer(
    left,  # (P, M)
    right,  # (T, D), strides rt and rd
    slot,  # (P,)
    starts,  # (blocks + 1, N)
    out,  # (N, M, D)
    sums,  # (N, M) where SUMS
    blocks,
    rt,
    rd,
    SUMS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[e] = sum over pairs p of e of left[p] x right[t]``; ``sums[e]``, that of left[p]."""
    e = tl.program_id(2)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(starts + e)
    end = tl.load(starts + blocks * N + e)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    alone = tl.zeros((ROWS,), tl.float32)
    for at in range(begin, end, BLOCK_K):
        p = at + tl.arange(0, BLOCK_K)
        live = p < end
        token = (tl.load(slot + p, mask=live, other=0) // N).to(tl.int64)
        a_mask = live[None, :] & (j < M)[:, None]
        a = tl.load(left + p.to(tl.int64)[None, :] * M + j[:, None], mask=a_mask, other=0.0)
        b_mask = live[:, None] & (d < D)[None, :]
        b = tl.load(right + token[:, None] * rt + d[None, :] * rd, mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if SUMS:
            alone += tl.sum(a.to(tl.float32), 1)
    place = (e * M + j).to(tl.int64)
    inside = (j < M)[:, None] & (d < D)[None, :]
    tl.store(out + place[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)
    if SUMS and tl.program_id(0) == 0:
        tl.store(sums + place, alone.to(sums.dtype.element_ty), mask=j < M)


SIGNATURE = {
    'left': '*bf16',
    'right': '*bf16',
    'slot': '*i32',
    'starts': '*i32',
    'out': '*bf16',
    'blocks': 'i32',
    'rt': 'i32',
}
CONSTANTS = {
    'sums': None,
    'rd': 1,
    'SUMS': False,
    'ROWS': 64,
    'COLUMNS': 64,
    'BLOCK_K': 32,
    'N': 64,
    'M': 128,
    'D': 2048,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
