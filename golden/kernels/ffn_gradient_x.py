"""ffn_gradient_x: written by sparsify 0.1.0 (sparsify compile --emit-triton).

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
    starts,  # (blocks + 1, N)
    select,  # (T, N)
    bias,  # (D,) where BIASED
    y,  # (T, D)
    tokens,
    BOTH: tl.constexpr,
    WEIGHED: tl.constexpr,  # by select; else every pair counts as one
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
    sums = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
    if BIASED:
        sums += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for e in range(N):
        begin = tl.load(starts + block * N + e)
        stop = tl.load(starts + (block + 1) * N + e)
        for at in range(begin, stop, ROWS):
            p = at + tl.arange(0, ROWS)
            live = p < stop
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
            # Pairs are in the order of tokens: a token's row of `total` is its rank among them.
            weight = tl.load(select + t * N + e, mask=t < tokens, other=0.0).to(tl.float32)
            rank = tl.cumsum((weight != 0.0).to(tl.int32), 0) - 1 - (at - begin)
            mine = (weight != 0.0) & (rank >= 0) & (rank < ROWS)
            row = tl.where(mine, rank, 0)[:, None]
            term = tl.gather(total, tl.broadcast_to(row, (BLOCK_T, COLUMNS)), 0)
            if WEIGHED:
                term = term * weight[:, None]
            sums += tl.where(mine[:, None], term, 0.0)
    out = y + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (d < D)[None, :])


SIGNATURE = {
    'one': '*bf16',
    'first': '*bf16',
    'two': '*bf16',
    'second': '*bf16',
    'starts': '*i32',
    'select': '*bf16',
    'y': '*bf16',
    'tokens': 'i32',
}
CONSTANTS = {
    'bias': None,
    'BOTH': True,
    'WEIGHED': False,
    'BIASED': False,
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
