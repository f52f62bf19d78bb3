"""scatter_rows: written by sparsify 0.1.0 (sparsify compile --emit-triton).

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
def scatter_rows(
    packed,  # (N, D)
    x,  # (N, D): what dead tokens keep, where KEEP
    dropped,  # (D,): added to dead tokens, where DROPPED
    live,  # (N,) uint8
    y,  # (N, D)
    tokens,
    width,
    stride_packed,
    stride_x,
    KEEP: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of tokens: packed rows where live, else x (or zero) with what stands in."""
    t, mine, place = live_places(live, tokens, BLOCK_T, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    here = (mine > 0)[:, None] & inside
    row = tl.load(
        packed + place[:, None].to(tl.int64) * stride_packed + d[None, :], mask=here, other=0.0
    )
    if KEEP:
        there = inside & (mine == 0)[:, None]
        rest = tl.load(x + t[:, None].to(tl.int64) * stride_x + d[None, :], mask=there, other=0.0)
        if DROPPED:
            rest += tl.load(dropped + d, mask=d < width, other=0.0).to(rest.dtype)[None, :]
        row = tl.where(here, row, rest)
    tl.store(y + t[:, None].to(tl.int64) * width + d[None, :], row, mask=inside)


SIGNATURE = {
    'packed': '*bf16',
    'x': '*bf16',
    'dropped': '*bf16',
    'live': '*u8',
    'y': '*bf16',
    'tokens': 'i32',
    'width': 'i32',
    'stride_packed': 'i32',
    'stride_x': 'i32',
}
CONSTANTS = {
    'KEEP': True,
    'DROPPED': True,
    'BLOCK_T': 32,
    'BLOCK_D': 128,
    'BLOCK_N': 1024,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
