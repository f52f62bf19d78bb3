"""ffn_gradient: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def act_grad(up, gate, grad):
    v0 = 1.0 / (1.0 + tl.exp(-gate))
    v1 = gate * v0
    v2 = v1 * up
    v3 = grad * up
    v4 = grad * v1
    v5 = v3 * v0
    v6 = v3 * gate
    v7 = 1.0 - v0
    v8 = v0 * v7
    v9 = v6 * v8
    v10 = v5 + v9
    return v2, v4, v10


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
def ffn_gradient(
    x,  # (T, D), strides xt and xd
    dy,  # (T, D), contiguous
    up,  # (N, M, D)
    gate,  # (N, M, D) where GATED
    down,  # (N, M, D)
    up_bias,  # (N, M) where BIASED
    gate_bias,  # (N, M) where GATE_BIASED
    select,  # (T, N)
    slot,  # (P,)
    starts,  # (blocks + 1, N)
    weighted,  # (P, M) out: neurons times their weight
    d_up,  # (P, M) out: gradient of x @ up_e.T
    d_gate,  # (P, M) out where GATED
    d_select,  # (column tiles, P) float32 out: parts of the gradient of the pair's weight
    most,  # P
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
    """Gradients at the neurons of all pairs."""
    first, last, upto, tiles = expert_tiles(starts, blocks, N, BLOCK_N, ROWS)
    columns: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    total = tl.sum(tiles, 0) * columns
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        e, p, live, column = tile_at(item, first, last, upto, tiles, columns, BLOCK_N, ROWS)
        j = column * COLUMNS + tl.arange(0, COLUMNS)
        place = tl.load(slot + p, mask=live, other=0)
        token = (place // N).to(tl.int64)
        row = (e * M + j).to(tl.int64)
        a = tl.zeros((ROWS, COLUMNS), tl.float32)
        b = tl.zeros((ROWS, COLUMNS), tl.float32)
        dh = tl.zeros((ROWS, COLUMNS), tl.float32)
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
            errors = tl.load(dy + token[:, None] * D + k[None, :], mask=left, other=0.0)
            downs = tl.load(down + row[None, :] * D + k[:, None], mask=right, other=0.0)
            dh = tl.dot(errors, downs, dh, input_precision=PRECISION)
        if BIASED:
            a += tl.load(up_bias + row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if GATE_BIASED:
            b += tl.load(gate_bias + row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(select + place, mask=live, other=0.0).to(tl.float32)[:, None]
        out = p.to(tl.int64)[:, None] * M + j[None, :]
        inside = live[:, None] & (j < M)[None, :]
        if GATED:
            h, da, db = ACT(a, b, dh * weight)
            tl.store(d_gate + out, db.to(d_gate.dtype.element_ty), mask=inside)
        else:
            h, da = ACT(a, dh * weight)
        tl.store(d_up + out, da.to(d_up.dtype.element_ty), mask=inside)
        tl.store(weighted + out, (h * weight).to(weighted.dtype.element_ty), mask=inside)
        part = tl.sum(tl.where(inside, h * dh, 0.0), 1)
        tl.store(d_select + column.to(tl.int64) * most + p, part, mask=live)


SIGNATURE = {
    'x': '*bf16',
    'dy': '*bf16',
    'up': '*bf16',
    'gate': '*bf16',
    'down': '*bf16',
    'select': '*bf16',
    'slot': '*i32',
    'starts': '*i32',
    'weighted': '*bf16',
    'd_up': '*bf16',
    'd_gate': '*bf16',
    'd_select': '*fp32',
    'most': 'i32',
    'blocks': 'i32',
    'xt': 'i32',
}
CONSTANTS = {
    'up_bias': None,
    'gate_bias': None,
    'xd': 1,
    'ACT': act_grad,
    'GATED': True,
    'BIASED': False,
    'GATE_BIASED': False,
    'BLOCK_N': 64,
    'ROWS': 32,
    'COLUMNS': 32,
    'BLOCK_K': 32,
    'N': 64,
    'M': 128,
    'D': 2048,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
