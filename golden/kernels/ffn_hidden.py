"""ffn_hidden: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def act(up, gate):
    v0 = 1.0 / (1.0 + tl.exp(-gate))
    v1 = gate * v0
    v2 = v1 * up
    return v2


@triton.jit
def expert_tiles(starts, blocks, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """(first pair, last pair, row tiles so far, row tiles) of every expert, each (BLOCK_N,)."""
    n = tl.arange(0, BLOCK_N)
    first = tl.load(starts + n, mask=n < N, other=0)
    last = tl.load(starts + blocks * N + n, mask=n < N, other=0)
    tiles = (last - first + ROWS - 1) // ROWS
    return first, last, tl.cumsum(tiles, 0), tiles


@triton.jit
def tile_at(item, first, last, upto, tiles, columns, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """Tile ``item`` of all: expert, pairs (ROWS,), whether they are there, and column tile.

    Each expert has its row tiles times ``columns`` of them; tiles that share weights are
    neighbours. The other arguments are :func:`expert_tiles`'.
    """
    e = tl.sum((upto * columns <= item).to(tl.int32), 0)
    mine = tl.arange(0, BLOCK_N) == e
    rows = tl.sum(tl.where(mine, tiles, 0), 0)
    local = item - columns * tl.sum(tl.where(mine, upto - tiles, 0), 0)
    p = tl.sum(tl.where(mine, first, 0), 0) + (local % rows) * ROWS + tl.arange(0, ROWS)
    return e, p, p < tl.sum(tl.where(mine, last, 0), 0), local // rows


@triton.jit
def ffn_hidden(
    x,  # (T, D), strides xt and xd
    up,  # (N, M, D)
    gate,  # (N, M, D) where GATED
    up_bias,  # (N, M) where BIASED
    gate_bias,  # (N, M) where GATE_BIASED
    slot,  # (P,)
    starts,  # (blocks + 1, N)
    h,  # (P, M)
    blocks,
    xt,
    xd,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    GATE_BIASED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Neurons of all pairs."""
    first, last, upto, tiles = expert_tiles(starts, blocks, N, BLOCK_N, ROWS)
    columns: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    total = tl.sum(tiles, 0) * columns
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        e, p, live, column = tile_at(item, first, last, upto, tiles, columns, BLOCK_N, ROWS)
        j = column * COLUMNS + tl.arange(0, COLUMNS)
        token = (tl.load(slot + p, mask=live, other=0) // N).to(tl.int64)
        row = (e * M + j).to(tl.int64)
        a = tl.zeros((ROWS, COLUMNS), tl.float32)
        b = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = live[:, None] & (k < D)[None, :]
            right = (j < M)[None, :] & (k < D)[:, None]
            tokens = tl.load(x + token[:, None] * xt + k[None, :] * xd, mask=left, other=0.0)
            ups = tl.load(up + row[None, :] * D + k[:, None], mask=right, other=0.0)
            a = tl.dot(tokens, ups, a, input_precision=PRECISION)
            if GATED:
                gates = tl.load(gate + row[None, :] * D + k[:, None], mask=right, other=0.0)
                b = tl.dot(tokens, gates, b, input_precision=PRECISION)
        if BIASED:
            a += tl.load(up_bias + row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if GATE_BIASED:
            b += tl.load(gate_bias + row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value = ACT(a, b)
        else:
            value = ACT(a)
        out = h + p.to(tl.int64)[:, None] * M + j[None, :]
        tl.store(out, value.to(h.dtype.element_ty), mask=live[:, None] & (j < M)[None, :])


SIGNATURE = {
    'x': '*bf16',
    'up': '*bf16',
    'gate': '*bf16',
    'slot': '*i32',
    'starts': '*i32',
    'h': '*bf16',
    'blocks': 'i32',
    'xt': 'i32',
}
CONSTANTS = {
    'up_bias': None,
    'gate_bias': None,
    'xd': 1,
    'ACT': act,
    'GATED': True,
    'BIASED': False,
    'GATE_BIASED': False,
    'BLOCK_N': 64,
    'ROWS': 64,
    'COLUMNS': 64,
    'BLOCK_K': 32,
    'N': 64,
    'M': 128,
    'D': 2048,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
