"""attend_prefill: written by sparsify 0.1.0 (sparsify compile --emit-triton).

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
        share, fade, most, norm = softmax_step(score, most, norm)
        value = tl.load(
            v + b * stride_vb + g * stride_vg + row[:, None] * stride_vs + e[None, :],
            mask=(s < stop)[:, None] & (e < VALUE)[None, :],
            other=0.0,
        )
        total = total * fade[:, None]
        total = tl.dot(share.to(value.dtype), value, total, input_precision=PRECISION)
    # A live row whose keys are all masked: NaN as softmax gives, or zero as safe softmax gives.
    empty = (at >= live) | SAFE
    result = total / tl.where(empty & (norm == 0.0), 1.0, norm)[:, None]
    place = (pair.to(tl.int64) * tokens + t)[:, None] * VALUE + e[None, :]
    tl.store(
        y + place,
        result.to(y.dtype.element_ty),
        mask=(at < tokens)[:, None] & (e < VALUE)[None, :],
    )


SIGNATURE = {
    'q': '*bf16',
    'k': '*bf16',
    'v': '*bf16',
    'mask': '*i8',
    'order': '*i32',
    'count': '*i32',
    'y': '*bf16',
    'scale': 'fp32',
    'heads': 'i32',
    'shared': 'i32',
    'tokens': 'i32',
    'keys': 'i32',
    'stride_qb': 'i32',
    'stride_qh': 'i32',
    'stride_qt': 'i32',
    'stride_kb': 'i32',
    'stride_kg': 'i32',
    'stride_ks': 'i32',
    'stride_vb': 'i32',
    'stride_vg': 'i32',
    'stride_vs': 'i32',
    'stride_mb': 'i32',
    'stride_mh': 'i32',
    'stride_mt': 'i32',
    'stride_ms': 'i32',
}
CONSTANTS = {
    'CAUSAL': True,
    'MASK': 0,
    'SAFE': True,
    'WIDTH': 128,
    'VALUE': 128,
    'BLOCK_D': 128,
    'BLOCK_V': 128,
    'BLOCK_T': 64,
    'BLOCK_S': 32,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 8, 'num_stages': 2}
