"""Routed heads attention: one pass over the keys with a running softmax, live pairs only.

``softmax(scale * q k^T + mask) v`` for live (token, head) pairs, zeros for the others
(:class:`sparsify.runtime.attend.RoutedAttend`). No score ever reaches memory (Dao et al.,
arXiv:2205.14135; the running softmax is Milakov & Gimelshein, arXiv:1805.02867).

* :func:`attend_prefill`: the live tokens of a head close up into tiles (see
  :func:`sparsify.codegen.triton.groups.group_tokens`), so a dead pair costs no row of a product,
  and a tile without a live one reads no key and no value. Causal: keys up to its last token.
* :func:`attend_decode`, :func:`attend_join`: one query row. The heads that share keys are one tile,
  so keys and values are read once, and not at all where all of them are dead; split over keys.

Keys and values come as (B, G, S, d), with any strides, or as pages through a block table.

Backward is eager: the scores are made again in float32 and held, as in eager training.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify.codegen.triton.attend_decode import attend_decode, attend_join
from sparsify.codegen.triton.attend_prefill import attend_prefill
from sparsify.codegen.triton.groups import bytes_of, grouped
from sparsify.codegen.triton.host import PROGRAMS, precision, rowwise, tile


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
        BLOCK_D=tile(width, 128), BLOCK_V=tile(value, 128), BLOCK_H=tile(shared, 128), BLOCK_S=step,
        PRECISION=precision(q), num_warps=4, num_stages=2,
    )  # fmt: skip
    attend_join[(batch * heads,)](
        sums, tops, chosen, y, heads, *chosen.stride(),
        SAFE=safe, SPLIT=split, VALUE=value, BLOCK_V=tile(value, 128), num_warps=1,
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
    rows = 16 if tokens <= 16 else 64
    attend_prefill[(triton.cdiv(tokens, rows), batch * heads)](
        q, k, v, seen, order, count, y, scale, heads, heads // kv_heads, tokens, keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0, 0) if mask is None else seen.stride()),
        CAUSAL=causal, MASK=_mask_kind(mask), SAFE=safe, WIDTH=width, VALUE=value,
        BLOCK_D=tile(width, 128), BLOCK_V=tile(value, 128), BLOCK_T=rows, BLOCK_S=32,
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
