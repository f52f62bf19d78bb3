"""Routed feed-forward layer, backward.

The neurons' inputs are computed again, beside their gradients, in one walk over D
(:func:`ffn_gradient`): keeping them would cost two rows of m for every pair. From these come the
gradients of x (``ffn_scatter`` of the forward) and of the weights (:func:`ffn_outer`). All sums are
float32 and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.activation import functions
from sparsify.codegen.triton.ffn import SHAPE, expert_tiles, scatter, sizes_of, tile_at
from sparsify.codegen.triton.ffn_samples import SILU
from sparsify.codegen.triton.ffn_samples import backward as sample
from sparsify.codegen.triton.host import PROGRAMS, tile
from sparsify.codegen.triton.pairs import sort_pairs
from sparsify.codegen.triton.spec import KernelSpec


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


@triton.jit
def ffn_outer(
    left,  # (P, M)
    right,  # (T, D), strides rt and rd
    slot,  # (P,)
    starts,  # (blocks + 1, N)
    out,  # (N, M, D)
    sums,  # (N, M) where SUMS
    blocks,
    rt,
    rd,
    SUMS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[e] = sum over pairs p of e of left[p] x right[t]``; ``sums[e]``, that of left[p]."""
    e = tl.program_id(2)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(starts + e)
    end = tl.load(starts + blocks * N + e)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    alone = tl.zeros((ROWS,), tl.float32)
    for at in range(begin, end, BLOCK_K):
        p = at + tl.arange(0, BLOCK_K)
        live = p < end
        token = (tl.load(slot + p, mask=live, other=0) // N).to(tl.int64)
        a_mask = live[None, :] & (j < M)[:, None]
        a = tl.load(left + p.to(tl.int64)[None, :] * M + j[:, None], mask=a_mask, other=0.0)
        b_mask = live[:, None] & (d < D)[None, :]
        b = tl.load(right + token[:, None] * rt + d[None, :] * rd, mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if SUMS:
            alone += tl.sum(a.to(tl.float32), 1)
    place = (e * M + j).to(tl.int64)
    inside = (j < M)[:, None] & (d < D)[None, :]
    tl.store(out + place[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)
    if SUMS and tl.program_id(0) == 0:
        tl.store(sums + place, alone.to(sums.dtype.element_ty), mask=j < M)


def outer(
    left: Tensor, right: Tensor, slot: Tensor, starts: Tensor, like: Tensor, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """(N, m, D) in the dtype of ``like``, and (N, m) if ``sums``."""
    n, m, d = like.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    alone = out.new_empty((n, m)) if sums else None
    rows, columns = tile(m, 64), tile(d, 64)
    ffn_outer[(triton.cdiv(d, columns), triton.cdiv(m, rows), n)](
        left, right, slot, starts, out, alone, len(starts) - 1, right.stride(0), right.stride(1),
        SUMS=sums, ROWS=rows, COLUMNS=columns, BLOCK_K=32, **sizes_of(like),
    )  # fmt: skip
    return out, alone


def backward(
    dy: Tensor,
    x: Tensor,
    select: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    most: int,
) -> list[Tensor | None]:
    """Gradients of x, select, up, gate, down, up_bias, gate_bias."""
    n, m, d = up.shape
    tokens = len(x)
    slot, starts = sort_pairs(select, most)
    dy = dy.to(x.dtype).contiguous()
    rows, columns = tile(most // n, 32), tile(m, 32)
    parts = triton.cdiv(m, columns)
    weighted = torch.empty((most, m), dtype=x.dtype, device=x.device)
    d_up = torch.empty_like(weighted)
    d_gate = None if gate is None else torch.empty_like(weighted)
    d_pair = torch.empty((parts, most), dtype=torch.float32, device=x.device)
    programs = min((triton.cdiv(most, rows) + n) * parts, PROGRAMS)
    ffn_gradient[(programs,)](
        x, dy, up, gate, down, up_bias, gate_bias, select, slot, starts, weighted, d_up, d_gate,
        d_pair, most, len(starts) - 1, x.stride(0), x.stride(1),
        ACT=functions(activation)[1], GATED=gate is not None, BIASED=up_bias is not None,
        GATE_BIASED=gate_bias is not None, BLOCK_N=triton.next_power_of_2(n),
        ROWS=rows, COLUMNS=columns, BLOCK_K=tile(d, 32), **sizes_of(up),
    )  # fmt: skip
    terms = [(d_up, up)]
    of_gate: tuple[Tensor | None, Tensor | None] = (None, None)
    if gate is not None and d_gate is not None:
        terms.append((d_gate, gate))
        of_gate = outer(d_gate, x, slot, starts, gate, gate_bias is not None)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scatter(terms, starts, select, dx, weighed=False)
    of_up = outer(d_up, x, slot, starts, up, up_bias is not None)
    of_down = outer(weighted, dy, slot, starts, down, False)
    # Slots past the last pair point one past the end, where what was never written ends up.
    flat = torch.zeros(tokens * n + 1, dtype=torch.float32, device=x.device)
    flat.scatter_(0, slot.long(), d_pair.sum(0))
    d_select = flat[:-1].view(tokens, n).to(select.dtype)
    return [dx, d_select, of_up[0], of_gate[0], of_down[0], of_up[1], of_gate[1]]


_PAIRS = {"slot": "*i32", "starts": "*i32"}
SPECS: tuple[KernelSpec, ...] = (
    KernelSpec(
        "ffn_gradient",
        ffn_gradient,
        dict.fromkeys(("x", "dy", "up", "gate", "down"), "*bf16")
        | {"select": "*bf16", **_PAIRS, "weighted": "*bf16", "d_up": "*bf16", "d_gate": "*bf16"}
        | {"d_select": "*fp32", "most": "i32", "blocks": "i32", "xt": "i32"},
        {"up_bias": None, "gate_bias": None, "xd": 1, "ACT": functions(SILU)[1], "GATED": True}
        | {"BIASED": False, "GATE_BIASED": False, "BLOCK_N": 64, "ROWS": 32, "COLUMNS": 32}
        | {"BLOCK_K": 32, **SHAPE},
        aligned=("xt",),
        gemm=True,
        sample=sample,
    ),
    KernelSpec(
        "ffn_outer",
        ffn_outer,
        {"left": "*bf16", "right": "*bf16", **_PAIRS, "out": "*bf16", "blocks": "i32", "rt": "i32"},
        {"sums": None, "rd": 1, "SUMS": False, "ROWS": 64, "COLUMNS": 64, "BLOCK_K": 32, **SHAPE},
        aligned=("rt",),
        gemm=True,
        sample=sample,
    ),
)
