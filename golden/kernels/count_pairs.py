"""count_pairs: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def count_pairs(
    select,  # (T, N)
    counts,  # (blocks, N) int32
    tokens,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Pairs of each expert in one block of tokens."""
    block = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (t < tokens)[:, None] & (n < N)[None, :]
    chosen = tl.load(select + t[:, None] * N + n[None, :], mask=inside, other=0.0)
    tl.store(counts + block * N + n, tl.sum((chosen != 0.0).to(tl.int32), 0), mask=n < N)


SIGNATURE = {
    'select': '*bf16',
    'counts': '*i32',
    'tokens': 'i32',
}
CONSTANTS = {
    'N': 64,
    'BLOCK_N': 64,
    'BLOCK_T': 64,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
