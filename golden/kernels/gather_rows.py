"""gather_rows: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def live_places(live, tokens, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens of the program's block, 1 where they live, and how many live before each."""
    first = tl.program_id(0) * BLOCK_T
    seen = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, first, BLOCK_N):
        before = start + tl.arange(0, BLOCK_N)
        seen += (tl.load(live + before, mask=before < first, other=0) != 0).to(tl.int32)
    t = first + tl.arange(0, BLOCK_T)
    mine = (tl.load(live + t, mask=t < tokens, other=0) != 0).to(tl.int32)
    return t, mine, tl.sum(seen, 0) + tl.cumsum(mine, 0) - mine


@triton.jit
def gather_rows(
    x,  # (N, D)
    live,  # (N,) uint8
    packed,  # (N, D): live rows, then zeros
    index,  # (N,) int32: the token of each packed row, then zeros
    count,  # (1,) int32
    tokens,
    width,
    stride_x,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The live rows of one block of tokens go behind those of the blocks before it.

    Every token writes one row: a dead one a row of zeros, counted from the end.
    """
    t, mine, place = live_places(live, tokens, BLOCK_T, BLOCK_N)
    block = tl.program_id(1)
    if block == 0:
        tl.store(count + t * 0, place + mine, mask=t == tokens - 1)  # by the last token
    place = tl.where(mine > 0, place, tokens - 1 - (t - place))  # t - place are dead before t
    if block == 0:
        tl.store(index + place, tl.where(mine > 0, t, 0), mask=t < tokens)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    moved = (mine > 0)[:, None] & inside
    row = tl.load(x + t[:, None].to(tl.int64) * stride_x + d[None, :], mask=moved, other=0.0)
    tl.store(packed + place[:, None].to(tl.int64) * width + d[None, :], row, mask=inside)


SIGNATURE = {
    'x': '*bf16',
    'live': '*u8',
    'packed': '*bf16',
    'index': '*i32',
    'count': '*i32',
    'tokens': 'i32',
    'width': 'i32',
    'stride_x': 'i32',
}
CONSTANTS = {
    'BLOCK_T': 32,
    'BLOCK_D': 128,
    'BLOCK_N': 1024,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
