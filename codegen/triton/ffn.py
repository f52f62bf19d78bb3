"""Routed feed-forward layer, forward: grouped matrix products over pairs sorted by expert.

``h[p] = act(x[t] @ up_e.T, x[t] @ gate_e.T)`` for every pair p = (t, e) (:func:`ffn_hidden`), then
``y[t] = bias + sum over its pairs of select[t, e] * h[p] @ down_e`` (:func:`ffn_scatter`); the same
kernel gives the gradient of x. Nothing of the size tokens x experts x neurons is made: h has one
row of m for every pair that there can be (under rules that cut, any token may use all N).

Scheduling. ``ffn_hidden`` is persistent: a fixed number of programs walk the tiles, whose number
and places they read on the device, so the host never waits for the counts.

Sums. A program of ``ffn_scatter`` owns a block of tokens and of outputs, and adds its experts'
products one after the other, in order, in float32 registers (a product's rows find their tokens
through shared memory: ``tl.gather``): no atomics (which would add in any order), no buffer of pairs
x D to reduce (with 64 fine experts, a quarter live, that is 16 rows of D for every token), and
every output is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton import ffn_samples
from sparsify.codegen.triton import pairs as pairs_module
from sparsify.codegen.triton.activation import functions
from sparsify.codegen.triton.ffn_samples import SILU
from sparsify.codegen.triton.host import PROGRAMS, precision, tile
from sparsify.codegen.triton.pairs import BLOCK
from sparsify.codegen.triton.spec import KernelSpec


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


def sizes_of(up: Tensor) -> dict[str, Any]:
    """Constants that all kernels of a layer share."""
    n, m, d = up.shape
    return {"N": n, "M": m, "D": d, "PRECISION": precision(up)}


def hidden(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    slot: Tensor,
    starts: Tensor,
    activation: str,
) -> Tensor:
    """h (P, m) of all pairs, in the dtype of x; rows past the last pair are not written."""
    n, m, d = up.shape
    h = torch.empty((len(slot), m), dtype=x.dtype, device=x.device)
    rows, columns = tile(len(slot) // n, 64), tile(m, 64)
    most = (triton.cdiv(len(slot), rows) + n) * triton.cdiv(m, columns)
    ffn_hidden[(min(most, PROGRAMS),)](
        x, up, gate, up_bias, gate_bias, slot, starts, h, len(starts) - 1, x.stride(0), x.stride(1),
        ACT=functions(activation)[0], GATED=gate is not None, BIASED=up_bias is not None,
        GATE_BIASED=gate_bias is not None, BLOCK_N=triton.next_power_of_2(n),
        ROWS=rows, COLUMNS=columns, BLOCK_K=tile(d, 32), **sizes_of(up),
    )  # fmt: skip
    return h


def scatter(
    terms: list[tuple[Tensor, Tensor]],
    starts: Tensor,
    select: Tensor,
    y: Tensor,
    *,
    weighed: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """y (T, D) = ``bias`` plus, for every pair, the ``left[p] @ right[e]`` of all terms.

    Args:
        terms: one or two of left (P, m), right (N, m, D).
        select: (T, N), contiguous; factors if ``weighed``.
    """
    (one, first), (two, second) = terms[0], terms[-1]
    n, m, d = first.shape
    rows, columns = tile(min(len(one) // n, BLOCK), 64), tile(d, 64)
    ffn_scatter[(len(starts) - 1, triton.cdiv(d, columns))](
        one, first, two, second, starts, select, bias, y, len(y),
        BOTH=len(terms) > 1, WEIGHED=weighed, BIASED=bias is not None, BLOCK_T=BLOCK,
        ROWS=rows, COLUMNS=columns, BLOCK_K=tile(m, 32), **sizes_of(first),
    )  # fmt: skip
    return y


# ------------------------------------------------------------------------------ static facts

SHAPE = {"N": 64, "M": 128, "D": 2048, "PRECISION": "tf32"}  # 64 fine experts of a 2048/8192 layer
SPECS: tuple[KernelSpec, ...] = (
    *pairs_module.SPECS,
    KernelSpec(
        "ffn_hidden",
        ffn_hidden,
        dict.fromkeys(("x", "up", "gate"), "*bf16")
        | {"slot": "*i32", "starts": "*i32", "h": "*bf16"}
        | {"blocks": "i32", "xt": "i32"},
        {"up_bias": None, "gate_bias": None, "xd": 1, "ACT": functions(SILU)[0], "GATED": True}
        | {"BIASED": False, "GATE_BIASED": False, "BLOCK_N": 64, "ROWS": 64, "COLUMNS": 64}
        | {"BLOCK_K": 32, **SHAPE},
        aligned=("xt",),
        gemm=True,
        sample=ffn_samples.prefill,
    ),
    KernelSpec(
        "ffn_scatter",
        ffn_scatter,
        dict.fromkeys(("one", "first", "two", "second"), "*bf16")
        | {"starts": "*i32", "select": "*bf16", "bias": "*bf16", "y": "*fp32", "tokens": "i32"},
        {"BOTH": False, "WEIGHED": True, "BIASED": True, "BLOCK_T": BLOCK, "ROWS": 64}
        | {"COLUMNS": 64, "BLOCK_K": 32, **SHAPE},
        gemm=True,
        sample=ffn_samples.prefill,
    ),
    KernelSpec(
        "ffn_gradient_x",
        ffn_scatter,
        dict.fromkeys(("one", "first", "two", "second"), "*bf16")
        | {"starts": "*i32", "select": "*bf16", "y": "*bf16", "tokens": "i32"},
        {"bias": None, "BOTH": True, "WEIGHED": False, "BIASED": False, "BLOCK_T": BLOCK}
        | {"ROWS": 64, "COLUMNS": 64, "BLOCK_K": 32, **SHAPE},
        gemm=True,
        sample=ffn_samples.backward,
    ),
)
