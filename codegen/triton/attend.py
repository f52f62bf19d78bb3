"""Routed heads attention: one pass over the keys with a running softmax, live pairs only.

``softmax(scale * q k^T + mask) v`` for live (token, head) pairs, zeros for the others
(:class:`sparsify.runtime.attend.RoutedAttend`). No score ever reaches memory (Dao et al.,
arXiv:2205.14135; the running softmax is Milakov & Gimelshein, arXiv:1805.02867).

* :func:`attend_prefill`: the live tokens of a head close up into tiles (see
  :func:`sparsify.codegen.triton.blocks.group_tokens`), so a dead pair costs no row of a product,
  and a tile without a live one reads no key and no value. Causal: keys up to its last token.
* :func:`attend_decode`, :func:`attend_join`: one query row. The heads that share keys are one tile,
  so keys and values are read once, and not at all where all of them are dead; split over keys.

Keys and values come as (B, G, S, d), with any strides, or as pages through a block table.

Backward is eager: the scores are made again in float32 and held, as in eager training.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.blocks import bytes_of, grouped
from sparsify.codegen.triton.host import PROGRAMS, precision, rowwise
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program, Ref


@triton.jit
def attend_prefill(
    q,  # (B, H, T, d)
    k,  # (B, G, S, d)
    v,  # (B, G, S, dv)
    mask,  # (B, H, T, S): bytes, zero = masked (MASK 1), or added to the scores (MASK 2)
    order,  # (B * H, T) int32: live tokens first
    count,  # (B * H,) int32
    y,  # (B, H, T, dv)
    scale,
    heads,
    shared,  # query heads of a key/value head
    tokens,
    keys,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    SAFE: tl.constexpr,
    WIDTH: tl.constexpr,  # d
    VALUE: tl.constexpr,  # dv
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of one head's live tokens against all keys; tiles of dead tokens store zeros."""
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // heads).to(tl.int64)
    h = pair % heads
    g = h // shared
    live = tl.load(count + pair)
    at = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tl.load(order + pair.to(tl.int64) * tokens + at, mask=at < tokens, other=0)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    query = tl.load(
        q + b * stride_qb + h * stride_qh + t[:, None].to(tl.int64) * stride_qt + d[None, :],
        mask=(at < live)[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    stop = tl.where(tile * BLOCK_T < live, keys, 0)  # no key is read for a tile of dead tokens
    if CAUSAL:
        stop = tl.minimum(stop, tl.max(tl.where(at < live, t, -1), 0) + 1)
    most = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_T,), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, stop, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        row = s.to(tl.int64)
        key = tl.load(
            k + b * stride_kb + g * stride_kg + row[None, :] * stride_ks + d[:, None],
            mask=(s < stop)[None, :] & (d < WIDTH)[:, None],
            other=0.0,
        )
        score = tl.dot(query, key, input_precision=PRECISION) * scale
        seen = (s < stop)[None, :] & (at < live)[:, None]
        if CAUSAL:
            seen = seen & (s[None, :] <= t[:, None])
        if MASK > 0:
            extra = tl.load(
                mask
                + b * stride_mb
                + h * stride_mh
                + t[:, None].to(tl.int64) * stride_mt
                + row[None, :] * stride_ms,
                mask=seen,
                other=0,
            )
            if MASK == 1:
                seen = seen & (extra != 0)
            else:
                score += extra.to(tl.float32)
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(most, tl.max(score, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        share = tl.exp(score - base[:, None])
        fade = tl.exp(most - base)
        norm = norm * fade + tl.sum(share, 1)
        value = tl.load(
            v + b * stride_vb + g * stride_vg + row[:, None] * stride_vs + e[None, :],
            mask=(s < stop)[:, None] & (e < VALUE)[None, :],
            other=0.0,
        )
        total = total * fade[:, None]
        total = tl.dot(share.to(value.dtype), value, total, input_precision=PRECISION)
        most = now
    # A live row whose keys are all masked: NaN as softmax gives, or zero as safe softmax gives.
    empty = (at >= live) | SAFE
    result = total / tl.where(empty & (norm == 0.0), 1.0, norm)[:, None]
    place = (pair.to(tl.int64) * tokens + t)[:, None] * VALUE + e[None, :]
    tl.store(
        y + place,
        result.to(y.dtype.element_ty),
        mask=(at < tokens)[:, None] & (e < VALUE)[None, :],
    )


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
        now = tl.maximum(most, tl.max(score, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        share = tl.exp(score - base[:, None])
        fade = tl.exp(most - base)
        norm = norm * fade + tl.sum(share, 1)
        value = tl.load(
            v + g * stride_vg + from_v[:, None] + e[None, :],
            mask=(s < stop)[:, None] & (e < VALUE)[None, :],
            other=0.0,
        )
        total = total * fade[:, None]
        total = tl.dot(share.to(value.dtype), value, total, input_precision=PRECISION)
        most = now
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


# ---------------------------------------------------------------------------- launchers


def _pad(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _mask_kind(mask: Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def _decode(
    q: Tensor,  # (B, H, d)
    k: Tensor,
    v: Tensor,
    k_strides: tuple[int, ...],  # row or page, kv head, key or slot
    v_strides: tuple[int, ...],
    select: Tensor,  # (B, H)
    mask: Tensor | None,  # (B, H, S)
    table: Tensor | None,
    lengths: Tensor | None,
    kv_heads: int,
    keys: int,
    page: int,
    scale: float,
    safe: bool,
) -> Tensor:
    batch, heads, width = q.shape
    value, shared = v.shape[-1], heads // kv_heads
    step, split = 64, 1
    while split < 16 and split * 2 * batch * kv_heads <= PROGRAMS and split * 8 * step <= keys:
        split *= 2
    sums = q.new_empty(split, batch * heads, value, dtype=torch.float32)
    tops = q.new_empty(split, batch * heads, 2, dtype=torch.float32)
    y = v.new_empty(batch, heads, 1, value)
    chosen = bytes_of(select)
    seen = chosen if mask is None else bytes_of(mask)
    attend_decode[(batch * kv_heads, split)](
        q, k, v, seen, chosen, chosen if table is None else table,
        chosen if lengths is None else lengths, sums, tops, scale, kv_heads, shared, keys,
        0 if table is None else table.shape[1], q.stride(0), q.stride(1), *k_strides, *v_strides,
        *((0, 0, 0) if mask is None else mask.stride()), *chosen.stride(),
        MASK=_mask_kind(mask), PAGE=page, SPLIT=split, WIDTH=width, VALUE=value,
        BLOCK_D=_pad(width), BLOCK_V=_pad(value), BLOCK_H=_pad(shared), BLOCK_S=step,
        PRECISION=precision(q), num_warps=4, num_stages=2,
    )  # fmt: skip
    attend_join[(batch * heads,)](
        sums, tops, chosen, y, heads, *chosen.stride(),
        SAFE=safe, SPLIT=split, VALUE=value, BLOCK_V=_pad(value), num_warps=1,
    )  # fmt: skip
    return y


@torch.library.custom_op("sparsify::routed_attend", mutates_args=())
def routed_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    safe: bool,
) -> Tensor:
    """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv), select (B, T, H) -> (B, H, T, dv).

    Args:
        mask: broadcasts to (B, H, T, S): bool, False = masked; else added to the scaled scores.
        causal: query t sees keys 0..t.
        safe: a row without a key gives zero instead of NaN.
    """
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    batch, heads, tokens, width = q.shape
    kv_heads, keys, value = k.shape[1], k.shape[2], v.shape[3]
    y = v.new_empty(batch, heads, tokens, value)
    if not y.numel():
        return y
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, keys)
    if tokens == 1 and not causal:
        return _decode(
            q[:, :, 0], k, v, k.stride()[:3], v.stride()[:3], select[:, 0],
            None if mask is None else mask[:, :, 0], None, None, kv_heads, keys, 0, scale, safe,
        )  # fmt: skip
    order, count = grouped(select)
    seen = order if mask is None else bytes_of(mask)
    tile = 16 if tokens <= 16 else 64
    attend_prefill[(triton.cdiv(tokens, tile), batch * heads)](
        q, k, v, seen, order, count, y, scale, heads, heads // kv_heads, tokens, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0, 0) if mask is None else seen.stride()),
        CAUSAL=causal, MASK=_mask_kind(mask), SAFE=safe, WIDTH=width, VALUE=value,
        BLOCK_D=_pad(width), BLOCK_V=_pad(value), BLOCK_T=tile, BLOCK_S=32,
        PRECISION=precision(q), num_warps=4 if max(width, value) <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return y


@routed_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    safe: bool,
) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, select, mask, ctx.scale, ctx.causal, _ = inputs
    ctx.save_for_backward(q, k, v, select, mask)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Eager: with p the probabilities, ``ds = p * (g v^T - sum(g v^T * p))``, as softmax's."""
    q, k, v, select, mask = ctx.saved_tensors
    shared = q.shape[1] // k.shape[1]
    live = (select != 0).transpose(1, 2)[..., None]
    wide = [t.float() for t in (q, k, v)]
    query, key, value = wide[0], *(t.repeat_interleave(shared, 1) for t in wide[1:])
    score = query @ key.transpose(2, 3) * ctx.scale
    if ctx.causal:
        future = torch.ones(score.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(future, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        score = score + mask
    share = torch.softmax(score, -1).nan_to_num(0.0)
    g = torch.where(live, g.float(), 0.0)
    back = g @ value.transpose(2, 3)
    ds = share * (back - (back * share).sum(-1, keepdim=True))
    groups = (k.shape[0], k.shape[1], shared, k.shape[2], -1)
    dk = (ds.transpose(2, 3) @ query * ctx.scale).view(groups).sum(2)
    dv = (share.transpose(2, 3) @ g).view(groups).sum(2)
    dmask = None
    if mask is not None and mask.dtype != torch.bool:
        dmask = ds.sum_to_size(mask.shape).to(mask.dtype)
    dq = (ds @ key * ctx.scale).to(q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None, dmask, None, None, None


routed_attend.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("sparsify::routed_attend_paged", mutates_args=())
def routed_attend_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    select: Tensor,
    scale: float,
) -> Tensor:
    """Decoding over a paged cache: every query sees the keys of its row. No backward.

    Args:
        q: (B, H, 1, d); select: (B, 1, H).
        k_pages, v_pages: (P, page, G, d) and (P, page, G, dv).
        table: int32 (B, most pages), a row's pages in order; lengths: int32 (B,), its keys.
    """
    q, k_pages, v_pages = rowwise(q), rowwise(k_pages), rowwise(v_pages)
    _, page, kv_heads, _ = k_pages.shape
    at = (0, 2, 1)  # page, kv head, slot
    return _decode(
        q[:, :, 0], k_pages, v_pages,
        tuple(k_pages.stride(n) for n in at), tuple(v_pages.stride(n) for n in at),
        select[:, 0], None, table.contiguous(), lengths.contiguous(), kv_heads,
        table.shape[1] * page, page, scale, True,
    )  # fmt: skip


@routed_attend_paged.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    select: Tensor,
    scale: float,
) -> Tensor:
    return v_pages.new_empty(*q.shape[:3], v_pages.shape[3])


# ---------------------------------------------------------------------------- score programs


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a score program does, where it is one of those that the kernels know.

    Attributes:
        scale: factor of the products. mask: the kind of its operand: none, bool, added.
        safe: whether a row without a key gives zero.
    """

    scale: float = 1.0
    mask: str = "none"
    safe: bool = False


def scores_of(program: Program) -> Scores:
    """Read ``[* scale] [mask] softmax``; Refused for anything else, with the step that it is."""

    def refuse(why: str) -> Refused:
        return Refused(
            f"its scores go through {why}: the kernel knows scale, one mask and softmax",
            suggestion="it stays eager",
        )

    found, at, dead, done = Scores(), program.inputs[0], "", False
    if len(program.inputs) > 2:
        raise refuse(f"{len(program.inputs) - 1} operands")
    operand = Ref(program.inputs[1]) if len(program.inputs) == 2 else None
    for step in program.steps:
        op, args = step.op.removeprefix("aten."), tuple(step.args)
        first, rest = args[:1] == (Ref(at),), args[1:]
        if op == "mul.Tensor" and first and found == Scores() and not done:
            if not isinstance(rest[0], int | float) or rest[0] <= 0:
                raise refuse("a factor that is not a positive number")
            found = dataclasses.replace(found, scale=float(rest[0]))
        elif op == "logical_not.default" and operand is not None and args == (operand,):
            dead = step.name
            continue
        elif op == "masked_fill.Scalar" and first and rest == (Ref(dead), -math.inf) and not done:
            found = dataclasses.replace(found, mask="bool")
        elif op == "add.Tensor" and first and operand is not None and rest == (operand,):
            if done or found.mask != "none" or step.kwargs:
                raise refuse(step.op)
            found = dataclasses.replace(found, mask="added")
        elif op in ("softmax.int", "_softmax.default", "_safe_softmax.default") and first:
            if done or rest[0] != -1:
                raise refuse(f"{step.op} over another dimension")
            found, done = dataclasses.replace(found, safe=op.startswith("_safe")), True
        elif not (done and first and op in ("_to_copy.default", "to.dtype")):
            raise refuse(step.op)
        at = step.name
    if not done or program.output != at:
        raise refuse("no softmax at the end")
    if operand is not None and found.mask == "none":
        raise refuse("an operand that is no mask")
    return found


class AttendKernel:
    """The kernel of a :class:`RoutedAttend`."""

    specs = ("group_tokens", "attend_prefill", "attend_decode", "attend_join")

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def __call__(self, module: RoutedAttend, *inputs: Tensor) -> Tensor | None:
        """q, k, v, select, the mask -> (B, H, T, dv); None where eager has to run."""
        q, k, v, select, *operands = inputs
        batch, heads, tokens, width = q.shape
        mask = operands[0] if operands else None
        fits = (q.dtype == k.dtype == v.dtype) and q.numel() and k.numel()
        if not fits or max(width, v.shape[3]) > 128:
            return None
        if mask is not None and (self.scores.mask == "bool") != (mask.dtype == torch.bool):
            return None
        if module.time_major:
            select = select.reshape(tokens, batch, heads).transpose(0, 1)
        select = select.expand(batch, tokens, heads)
        module.dtype = k.dtype
        live = int((select != 0).sum())
        module.counter.seen(batch * tokens, heads, live)
        module.counter.rows += live
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        y: Tensor = routed_attend(
            q, k, v, select, mask, self.scores.scale, module.causal, self.scores.safe
        )
        return y


def lower(module: RoutedAttend) -> AttendKernel:
    """The module's kernel; Refused for a score program that it does not know."""
    if max(module.head_dim, module.value_dim) > 128:
        raise Refused(f"heads of {max(module.head_dim, module.value_dim)} are wider than 128")
    return AttendKernel(scores_of(module.score))


# ---------------------------------------------------------------------------- specs


def _sample(tokens: int, keys: int, masked: bool = False) -> Sample:
    """8 heads on 4 key/value heads, two of which have live heads, for all tokens."""
    q = torch.zeros(1, 8, tokens, 64, dtype=torch.float16)
    k = torch.zeros(1, 4, keys, 64, dtype=torch.float16)
    select = torch.zeros(1, tokens, 8)
    select[:, :, 2:6] = 1
    v = k.clone()
    mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool) if masked else None
    # live queries, keys and values of live key/value heads, the selection, the result, the mask
    least = q.numel() + 2 * k.numel() + select.numel() * 4 + q.numel() * 2
    least += tokens * keys if masked else 0
    return Sample(lambda: routed_attend(q, k, v, select, mask, 0.125, False, True), least)


def _paged_sample() -> Sample:
    """Two rows of 40 and 25 pages, two of four key/value heads live."""
    q, select = torch.zeros(2, 8, 1, 64, dtype=torch.float16), torch.zeros(2, 1, 8)
    select[:, :, 2:6] = 1
    k = torch.zeros(80, 16, 4, 64, dtype=torch.float16)
    v, table = k.clone(), torch.arange(80, dtype=torch.int32).view(2, 40)
    lengths = torch.tensor([640, 400], dtype=torch.int32)
    # live queries, keys and values of live heads, the pages' numbers, the selection, the result
    least = q.numel() + 2 * 1040 * 2 * 64 * 2 + 65 * 4 + select.numel() * 4 + q.numel() * 2
    return Sample(lambda: routed_attend_paged(q, k, v, table, lengths, select, 0.125), least)


def _types(*names: str) -> dict[str, str]:
    known = {
        "order": "*i32", "count": "*i32", "table": "*i32", "lengths": "*i32", "select": "*fp32",
        "mask": "*i8", "sums": "*fp32", "tops": "*fp32", "scale": "fp32",
    }  # fmt: skip
    return {n: known.get(n, "*bf16" if n in ("q", "k", "v", "y") else "i32") for n in names}


def _strides(letter: str, axes: str) -> tuple[str, ...]:
    return tuple(f"stride_{letter}{a}" for a in axes)


_ALIGNED = (*_strides("q", "bht"), *_strides("k", "bgs"), *_strides("v", "bgs"))
_WIDTHS = {"WIDTH": 128, "VALUE": 128, "BLOCK_D": 128, "BLOCK_V": 128}
_DECODE = _types(
    "q", "k", "v", "mask", "select", "table", "lengths", "sums", "tops", "scale", "kv_heads",
    "shared", "keys", "pages", *_strides("q", "bh"), *_strides("k", "bgs"), *_strides("v", "bgs"),
    *_strides("m", "bhs"), *_strides("l", "bh"),
)  # fmt: skip

SPECS = (
    KernelSpec(
        "attend_prefill",
        attend_prefill,
        _types(
            "q",
            "k",
            "v",
            "mask",
            "order",
            "count",
            "y",
            "scale",
            "heads",
            "shared",
            "tokens",
            "keys",
            *_ALIGNED,
            *_strides("m", "bhts"),
        ),
        {
            "CAUSAL": True,
            "MASK": 0,
            "SAFE": True,
            **_WIDTHS,
            "BLOCK_T": 64,
            "BLOCK_S": 32,
            "PRECISION": "tf32",
        },
        num_warps=8,
        aligned=_ALIGNED,
        gemm=True,
        sample=lambda: _sample(32, 512),
    ),
    KernelSpec(
        "attend_prefill_masked",
        attend_prefill,
        _types(
            "q",
            "k",
            "v",
            "mask",
            "order",
            "count",
            "y",
            "scale",
            "heads",
            "shared",
            "tokens",
            "keys",
            *_ALIGNED,
            *_strides("m", "bhts"),
        ),
        {
            "CAUSAL": False,
            "MASK": 1,
            "SAFE": True,
            **_WIDTHS,
            "BLOCK_T": 64,
            "BLOCK_S": 32,
            "PRECISION": "tf32",
        },
        num_warps=8,
        aligned=_ALIGNED,
        gemm=True,
        sample=lambda: _sample(32, 512, masked=True),
    ),
    KernelSpec(
        "attend_decode",
        attend_decode,
        _DECODE,
        {
            "MASK": 0,
            "PAGE": 0,
            "SPLIT": 8,
            **_WIDTHS,
            "BLOCK_H": 16,
            "BLOCK_S": 64,
            "PRECISION": "tf32",
        },
        aligned=tuple(n for n in _ALIGNED if n != "stride_qt"),
        gemm=True,
        sample=lambda: _sample(1, 2048),
    ),
    KernelSpec(
        "attend_decode_paged",
        attend_decode,
        _DECODE,
        {
            "MASK": 0,
            "PAGE": 16,
            "SPLIT": 8,
            **_WIDTHS,
            "BLOCK_H": 16,
            "BLOCK_S": 64,
            "PRECISION": "tf32",
        },
        aligned=tuple(n for n in _ALIGNED if n != "stride_qt"),
        gemm=True,
        sample=_paged_sample,
    ),
    KernelSpec(
        "attend_join",
        attend_join,
        _types("sums", "tops", "select", "y", "heads", *_strides("l", "bh")),
        {"SAFE": True, "SPLIT": 8, "VALUE": 128, "BLOCK_V": 128},
        num_warps=1,
    ),
)
