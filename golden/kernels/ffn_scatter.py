"""ffn_scatter: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def ffn_scatter(
    one,  # (P, M)
    first,  # (N, M, D)
    two,  # (P, M) where BOTH
    second,  # (N, M, D) where BOTH
    slot,  # (P,)
    starts,  # (blocks + 1, N)
    select,  # (T, N) where WEIGHED
    bias,  # (D,) where BIASED
    y,  # (T, D) float32
    tokens,
    BOTH: tl.constexpr,
    WEIGHED: tl.constexpr,
    BIASED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over the pairs of a block of tokens, for a block of outputs."""
    block = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
    if BIASED:
        begin += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    own = y + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(own, begin, mask=(t < tokens)[:, None] & (d < D)[None, :])
    tl.debug_barrier()  # other threads of this program add to what these wrote
    for e in range(N):
        stop = tl.load(starts + (block + 1) * N + e)
        for at in range(tl.load(starts + block * N + e), stop, ROWS):
            p = at + tl.arange(0, ROWS)
            live = p < stop
            place = tl.load(slot + p, mask=live, other=0)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for begin_k in range(0, M, BLOCK_K):
                k = begin_k + tl.arange(0, BLOCK_K)
                left = p.to(tl.int64)[:, None] * M + k[None, :]
                right = (e * M + k).to(tl.int64)[:, None] * D + d[None, :]
                rows = live[:, None] & (k < M)[None, :]
                inside = (k < M)[:, None] & (d < D)[None, :]
                a = tl.load(one + left, mask=rows, other=0.0)
                w = tl.load(first + right, mask=inside, other=0.0)
                total = tl.dot(a, w, total, input_precision=PRECISION)
                if BOTH:
                    a = tl.load(two + left, mask=rows, other=0.0)
                    w = tl.load(second + right, mask=inside, other=0.0)
                    total = tl.dot(a, w, total, input_precision=PRECISION)
            if WEIGHED:
                weight = tl.load(select + place, mask=live, other=0.0).to(tl.float32)
                total = total * weight[:, None]
            out = y + (place // N).to(tl.int64)[:, None] * D + d[None, :]
            inside = live[:, None] & (d < D)[None, :]
            tl.store(out, tl.load(out, mask=inside, other=0.0) + total, mask=inside)
            tl.debug_barrier()


SIGNATURE = {
    'one': '*bf16',
    'first': '*bf16',
    'two': '*bf16',
    'second': '*bf16',
    'slot': '*i32',
    'starts': '*i32',
    'select': '*bf16',
    'bias': '*bf16',
    'y': '*fp32',
    'tokens': 'i32',
}
CONSTANTS = {
    'BOTH': False,
    'WEIGHED': True,
    'BIASED': True,
    'BLOCK_T': 64,
    'ROWS': 64,
    'COLUMNS': 64,
    'BLOCK_K': 32,
    'N': 64,
    'M': 128,
    'D': 2048,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
