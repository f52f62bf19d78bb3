"""attend_decode_paged: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_step(score, most, norm):
    """One more block of scores (rows, keys) of a running softmax.

    ``most`` (rows,) is the largest score so far, ``norm`` the sum of ``exp(score - most)``. Gives
    the block's exponentials, what earlier sums are multiplied by, and both for the next block. A
    row that has seen no key yet (all -inf) adds nothing.
    """
    now = tl.maximum(most, tl.max(score, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    share = tl.exp(score - base[:, None])
    fade = tl.exp(most - base)
    return share, fade, now, norm * fade + tl.sum(share, 1)


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


SIGNATURE = {
    'q': '*bf16',
    'k': '*bf16',
    'v': '*bf16',
    'mask': '*i8',
    'select': '*fp32',
    'table': '*i32',
    'lengths': '*i32',
    'sums': '*fp32',
    'tops': '*fp32',
    'scale': 'fp32',
    'kv_heads': 'i32',
    'shared': 'i32',
    'keys': 'i32',
    'pages': 'i32',
    'stride_qb': 'i32',
    'stride_qh': 'i32',
    'stride_kb': 'i32',
    'stride_kg': 'i32',
    'stride_ks': 'i32',
    'stride_vb': 'i32',
    'stride_vg': 'i32',
    'stride_vs': 'i32',
    'stride_mb': 'i32',
    'stride_mh': 'i32',
    'stride_ms': 'i32',
    'stride_lb': 'i32',
    'stride_lh': 'i32',
}
CONSTANTS = {
    'MASK': 0,
    'PAGE': 16,
    'SPLIT': 8,
    'WIDTH': 128,
    'VALUE': 128,
    'BLOCK_D': 128,
    'BLOCK_V': 128,
    'BLOCK_H': 16,
    'BLOCK_S': 64,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
