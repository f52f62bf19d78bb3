"""decode_down_1: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def live_experts(select, tokens, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """(BLOCK_N,) how many experts up to each are live for any token."""
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    inside = (t < tokens)[:, None] & (n < N)[None, :]
    chosen = tl.load(select + t[:, None] * N + n[None, :], mask=inside, other=0.0)
    return tl.cumsum(tl.max((chosen != 0.0).to(tl.int32), 0), 0)


@triton.jit
def decode_down(
    h,  # (T, N, M)
    down,  # (N, M, D)
    select,  # (T, N)
    part,  # (SPLIT, T, D) float32
    tokens,
    SPLIT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the sum over the live experts' neurons, for a block of outputs."""
    upto = live_experts(select, tokens, N, BLOCK_N, BLOCK_T)
    steps: tl.constexpr = (M + BLOCK_K - 1) // BLOCK_K
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
    for item in range(tl.program_id(1), tl.max(upto, 0) * steps, SPLIT):
        e = tl.sum((upto <= item // steps).to(tl.int32), 0)
        k = (item % steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        row = (e * M + k).to(tl.int64)
        inside = (k < M)[:, None] & (d < D)[None, :]
        w = tl.load(down + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        weight = tl.load(select + t * N + e, mask=t < tokens, other=0.0).to(tl.float32)
        left = (weight != 0.0)[:, None] & (k < M)[None, :]
        a = tl.load(h + t[:, None] * (N * M) + row[None, :], mask=left, other=0.0)
        if BLOCK_T == 1:
            column = tl.sum(a.to(tl.float32), 0)[:, None]
            product = tl.sum(column * w.to(tl.float32), 0)[None, :]
        else:
            product = tl.dot(a, w, input_precision=PRECISION)
        total += product * weight[:, None]
    out = part + (tl.program_id(1) * tokens + t).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, total, mask=(t < tokens)[:, None] & (d < D)[None, :])


SIGNATURE = {
    'h': '*bf16',
    'down': '*bf16',
    'select': '*bf16',
    'part': '*fp32',
    'tokens': 'i32',
}
CONSTANTS = {
    'SPLIT': 8,
    'COLUMNS': 64,
    'BLOCK_K': 32,
    'BLOCK_N': 64,
    'BLOCK_T': 1,
    'N': 64,
    'M': 128,
    'D': 2048,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
