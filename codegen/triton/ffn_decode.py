"""Routed feed-forward layer for a few tokens: products with vectors, bound by memory.

The list of experts that are live for any token is made in registers by every program (tokens x N
flags), and the programs walk blocks of neurons of those experts only: no weight of a dead one is
read, and the work is even whichever experts are live. :func:`decode_hidden` splits over neurons,
:func:`decode_down`, whose reduction runs over neurons, is split into ``SPLIT`` parts that are added
in order. One token is multiplied without ``tl.dot``, whose least tile has sixteen rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton import ffn_samples
from sparsify.codegen.triton.activation import functions
from sparsify.codegen.triton.ffn import SHAPE, sizes_of
from sparsify.codegen.triton.ffn_samples import SILU
from sparsify.codegen.triton.host import PROGRAMS, splits, tile
from sparsify.codegen.triton.parts import add_parts
from sparsify.codegen.triton.spec import KernelSpec


@triton.jit
def live_experts(select, tokens, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """(BLOCK_N,) how many experts up to each are live for any token."""
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    inside = (t < tokens)[:, None] & (n < N)[None, :]
    chosen = tl.load(select + t[:, None] * N + n[None, :], mask=inside, other=0.0)
    return tl.cumsum(tl.max((chosen != 0.0).to(tl.int32), 0), 0)


@triton.jit
def decode_hidden(
    x,  # (T, D), strides xt and xd
    up,  # (N, M, D)
    gate,  # (N, M, D) where GATED
    up_bias,  # (N, M) where BIASED
    gate_bias,  # (N, M) where GATE_BIASED
    select,  # (T, N)
    h,  # (T, N, M): written where an expert is live for any token
    tokens,
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
    BLOCK_T: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Neurons of the live experts."""
    upto = live_experts(select, tokens, N, BLOCK_N, BLOCK_T)
    columns: tl.constexpr = (M + COLUMNS - 1) // COLUMNS
    t = tl.arange(0, BLOCK_T)
    for item in range(tl.program_id(0), tl.max(upto, 0) * columns, tl.num_programs(0)):
        e = tl.sum((upto <= item // columns).to(tl.int32), 0)
        j = (item % columns) * COLUMNS + tl.arange(0, COLUMNS)
        row = (e * M + j).to(tl.int64)
        if BLOCK_T == 1:
            a1 = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
            b1 = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
            for start in range(0, D, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                inside = (j < M)[:, None] & (k < D)[None, :]
                one = tl.load(x + k * xd, mask=k < D, other=0.0).to(tl.float32)[None, :]
                at = row[:, None] * D + k[None, :]
                a1 += tl.load(up + at, mask=inside, other=0.0).to(tl.float32) * one
                if GATED:
                    b1 += tl.load(gate + at, mask=inside, other=0.0).to(tl.float32) * one
            a = tl.sum(a1, 1)[None, :]
            b = tl.sum(b1, 1)[None, :]
        else:
            a = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
            b = tl.zeros((BLOCK_T, COLUMNS), tl.float32)
            for start in range(0, D, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                inside = (j < M)[None, :] & (k < D)[:, None]
                left = (t < tokens)[:, None] & (k < D)[None, :]
                few = tl.load(x + t[:, None] * xt + k[None, :] * xd, mask=left, other=0.0)
                at = row[None, :] * D + k[:, None]
                ups = tl.load(up + at, mask=inside, other=0.0)
                a = tl.dot(few, ups, a, input_precision=PRECISION)
                if GATED:
                    gates = tl.load(gate + at, mask=inside, other=0.0)
                    b = tl.dot(few, gates, b, input_precision=PRECISION)
        if BIASED:
            a += tl.load(up_bias + row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if GATE_BIASED:
            b += tl.load(gate_bias + row, mask=j < M, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value = ACT(a, b)
        else:
            value = ACT(a)
        out = h + t[:, None] * (N * M) + row[None, :]
        inside = (t < tokens)[:, None] & (j < M)[None, :]
        tl.store(out, value.to(h.dtype.element_ty), mask=inside)


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


def decode(
    x: Tensor,
    select: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """y (T, D) float32 of at most 16 tokens; ``select`` is contiguous."""
    n, m, d = up.shape
    tokens = len(x)
    shared = {
        "BLOCK_N": triton.next_power_of_2(n),
        "BLOCK_T": 1 if tokens == 1 else 16,
        **sizes_of(up),
    }
    h = torch.empty((tokens, n, m), dtype=x.dtype, device=x.device)
    columns = tile(m, 16)
    decode_hidden[(min(n * triton.cdiv(m, columns), 2 * PROGRAMS),)](
        x, up, gate, up_bias, gate_bias, select, h, tokens, x.stride(0), x.stride(1),
        ACT=functions(activation)[0], GATED=gate is not None, BIASED=up_bias is not None,
        GATE_BIASED=gate_bias is not None, COLUMNS=columns, BLOCK_K=tile(d, 128), **shared,
    )  # fmt: skip
    columns = tile(d, 64)
    blocks = triton.cdiv(d, columns)
    split = splits(blocks, n * m, tokens)
    part = torch.empty((split, tokens, d), dtype=torch.float32, device=x.device)
    decode_down[(blocks, split)](
        h, down, select, part, tokens, SPLIT=split, COLUMNS=columns, BLOCK_K=tile(m, 32), **shared
    )
    if split == 1 and down_bias is None:
        return part[0]
    return add_parts(part, None, down_bias, torch.empty_like(part[0]))


def _specs(tokens: int) -> tuple[KernelSpec, ...]:
    block = 1 if tokens == 1 else 16
    shared = {"BLOCK_N": 64, "BLOCK_T": block, **SHAPE}
    sample = functools.partial(ffn_samples.decode, tokens)
    hidden = dict.fromkeys(("x", "up", "gate", "select", "h"), "*bf16")
    return (
        KernelSpec(
            f"decode_hidden_{tokens}",
            decode_hidden,
            hidden | {"tokens": "i32", "xt": "i32"},
            {"up_bias": None, "gate_bias": None, "xd": 1, "ACT": functions(SILU)[0]}
            | {"GATED": True, "BIASED": False, "GATE_BIASED": False}
            | {"COLUMNS": 16, "BLOCK_K": 128, **shared},
            aligned=("xt",),
            gemm=tokens > 1,
            sample=sample,
        ),
        KernelSpec(
            f"decode_down_{tokens}",
            decode_down,
            dict.fromkeys(("h", "down", "select"), "*bf16") | {"part": "*fp32", "tokens": "i32"},
            {"SPLIT": 8, "COLUMNS": 64, "BLOCK_K": 32, **shared},
            gemm=tokens > 1,
            sample=sample,
        ),
    )


SPECS: tuple[KernelSpec, ...] = (*_specs(1), *_specs(8))
