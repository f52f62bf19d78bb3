"""place_pairs: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def place_pairs(
    select,  # (T, N)
    counts,  # (blocks, N) int32
    slot,  # (P,) int32
    starts,  # (blocks + 1, N) int32
    tokens,
    blocks,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Where the pairs of one block of tokens go."""
    block = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    before = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N,), tl.int32)
    for b in range(blocks):
        count = tl.load(counts + b * N + n, mask=n < N, other=0)
        before += tl.where(b < block, count, 0)
        total += count
    start = tl.cumsum(total, 0) - total + before
    tl.store(starts + block * N + n, start, mask=n < N)
    if block == blocks - 1:
        tl.store(starts + blocks * N + n, tl.cumsum(total, 0), mask=n < N)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (t < tokens)[:, None] & (n < N)[None, :]
    chosen = tl.load(select + t[:, None] * N + n[None, :], mask=inside, other=0.0) != 0.0
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    place = start[None, :] + rank
    tl.store(slot + place, t[:, None] * N + n[None, :], mask=chosen)


SIGNATURE = {
    'select': '*bf16',
    'counts': '*i32',
    'slot': '*i32',
    'starts': '*i32',
    'tokens': 'i32',
    'blocks': 'i32',
}
CONSTANTS = {
    'N': 64,
    'BLOCK_N': 64,
    'BLOCK_T': 64,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
