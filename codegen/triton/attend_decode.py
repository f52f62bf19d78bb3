"""Attention of one query row, split over keys (see :mod:`sparsify.codegen.triton.attend_ops`)."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsify.codegen.triton.softmax import softmax_step


@triton.jit
def attend_decode(
    q,  # (B, H, d)
    k,  # (B, G, S, d); pages (P, PAGE, G, d) where PAGE > 0, with strides page, kv head, slot
    v,
    mask,  # (B, H, S)
    select,  # (B, H)
    table,  # (B, pages) int32: the page of each run of PAGE keys, where PAGE > 0
    lengths,  # (B,) int32: keys of each row, where PAGE > 0
    sums,  # (SPLIT, B * H, dv) float32
    tops,  # (SPLIT, B * H, 2) float32: largest score, sum of exponentials
    scale,
    kv_heads,
    shared,
    keys,
    pages,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_lb,
    stride_lh,
    MASK: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The heads of one key/value head against a part of its keys; nothing read if all are dead."""
    group = tl.program_id(0)
    split = tl.program_id(1)
    row = group // kv_heads
    b = row.to(tl.int64)
    g = group % kv_heads
    n = tl.arange(0, BLOCK_H)
    h = g * shared + n
    chosen = tl.load(select + b * stride_lb + h * stride_lh, mask=n < shared, other=0)
    live = (chosen != 0) & (n < shared)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    query = tl.load(
        q + b * stride_qb + h[:, None] * stride_qh + d[None, :],
        mask=live[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    length = keys
    if PAGE > 0:
        length = tl.load(lengths + b)
    span = tl.cdiv(tl.cdiv(length, SPLIT), BLOCK_S) * BLOCK_S
    stop = tl.minimum(split * span + span, length)
    stop = tl.where(tl.max(live.to(tl.int32), 0) > 0, stop, 0)
    most = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_V), tl.float32)
    for start in range(split * span, stop, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        if PAGE > 0:
            page = tl.load(table + b * pages + s // PAGE, mask=s < stop, other=0).to(tl.int64)
            slot = (s % PAGE).to(tl.int64)
            from_k = page * stride_kb + slot * stride_ks
            from_v = page * stride_vb + slot * stride_vs
        else:
            from_k = b * stride_kb + s.to(tl.int64) * stride_ks
            from_v = b * stride_vb + s.to(tl.int64) * stride_vs
        key = tl.load(
            k + g * stride_kg + from_k[None, :] + d[:, None],
            mask=(s < stop)[None, :] & (d < WIDTH)[:, None],
            other=0.0,
        )
        score = tl.dot(query, key, input_precision=PRECISION) * scale
        seen = (s < stop)[None, :] & live[:, None]
        if MASK > 0:
            extra = tl.load(
                mask + b * stride_mb + h[:, None] * stride_mh + s[None, :].to(tl.int64) * stride_ms,
                mask=seen,
                other=0,
            )
            if MASK == 1:
                seen = seen & (extra != 0)
            else:
                score += extra.to(tl.float32)
        score = tl.where(seen, score, float("-inf"))
        share, fade, most, norm = softmax_step(score, most, norm)
        value = tl.load(
            v + g * stride_vg + from_v[:, None] + e[None, :],
            mask=(s < stop)[:, None] & (e < VALUE)[None, :],
            other=0.0,
        )
        total = total * fade[:, None]
        total = tl.dot(share.to(value.dtype), value, total, input_precision=PRECISION)
    place = split * tl.num_programs(0) * shared + group * shared + n
    tl.store(
        sums + place[:, None] * VALUE + e[None, :], total,
        mask=live[:, None] & (e < VALUE)[None, :],
    )  # fmt: skip
    tl.store(tops + 2 * place, most, mask=live)
    tl.store(tops + 2 * place + 1, norm, mask=live)


@triton.jit
def attend_join(
    sums,  # (SPLIT, B * H, dv) float32
    tops,  # (SPLIT, B * H, 2) float32
    select,  # (B, H)
    y,  # (B * H, dv)
    heads,
    stride_lb,
    stride_lh,
    SAFE: tl.constexpr,
    SPLIT: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One head's parts, each scaled to the largest score of all; zeros for a dead head."""
    pair = tl.program_id(0)
    rows = tl.num_programs(0)
    chosen = tl.load(select + (pair // heads) * stride_lb + (pair % heads) * stride_lh)
    e = tl.arange(0, BLOCK_V)
    parts = tl.where(chosen != 0, SPLIT, 0)
    most = float("-inf")
    for split in range(parts):
        most = tl.maximum(most, tl.load(tops + 2 * (split * rows + pair)))
    base = tl.where(most == float("-inf"), 0.0, most)
    norm = 0.0
    total = tl.zeros((BLOCK_V,), tl.float32)
    for split in range(parts):
        place = split * rows + pair
        fade = tl.exp(tl.load(tops + 2 * place) - base)
        norm += fade * tl.load(tops + 2 * place + 1)
        total += fade * tl.load(sums + place * VALUE + e, mask=e < VALUE, other=0.0)
    empty = (chosen == 0) | SAFE
    result = total / tl.where(empty & (norm == 0.0), 1.0, norm)
    tl.store(y + pair * VALUE + e, result.to(y.dtype.element_ty), mask=e < VALUE)
