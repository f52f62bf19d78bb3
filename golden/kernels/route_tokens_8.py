"""route_tokens_8: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def route_tokens(
    x,  # (T, D), strides xt and xd
    weight,  # (R, D)
    bias,  # (R,)
    order,  # (S + R,) int64 where ORDERED
    select,  # (T, S + R) out
    tokens,
    keep,  # routed units of a token, where COUNTS
    threshold,  # else those above it
    xt,
    xd,
    COUNTS: tl.constexpr,
    ORDERED: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The selection of a block of tokens: 1 where live, else 0."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = (t < tokens)[:, None] & (k < D)[None, :]
        right = (r < R)[None, :] & (k < D)[:, None]
        at = t.to(tl.int64)[:, None] * xt + k[None, :] * xd
        a = tl.load(x + at, mask=left, other=0.0)
        w = tl.load(weight + r[None, :] * D + k[:, None], mask=right, other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    total += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    score = total.to(x.dtype.element_ty).to(tl.float32) + 0.0  # no negative zero
    if COUNTS:
        bits = score.to(tl.int32, bitcast=True)
        # NaN ranks above infinity, as in torch.sort; units that are not there below everything.
        bits = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
        key = tl.where((r < R)[None, :], bits.to(tl.int64) + 2147483649, 0)  # 1 and up
        cut = tl.zeros((BLOCK_T,), tl.int64)
        step = tl.full((BLOCK_T,), 4294967296, tl.int64)
        for _ in range(33):
            more = tl.sum((key >= (cut + step)[:, None]).to(tl.int32), 1) >= keep
            cut = tl.where(more, cut + step, cut)
            step = step // 2
        above = (key > cut[:, None]).to(tl.int32)
        tied = (key == cut[:, None]).to(tl.int32)
        room = keep - tl.sum(above, 1)
        first = tied * (tl.cumsum(tied, 1) <= room[:, None]).to(tl.int32)
        live = (above + first) > 0
    else:
        live = score > threshold
    if ORDERED:
        column = tl.load(order + S + r, mask=r < R, other=0).to(tl.int32)
    else:
        column = S + r
    row = t.to(tl.int64)[:, None] * (S + R)
    inside = (t < tokens)[:, None] & (r < R)[None, :]
    value = tl.where(live, 1.0, 0.0).to(select.dtype.element_ty)
    tl.store(select + row + column[None, :], value, mask=inside)
    for s in range(S):
        if ORDERED:
            place = tl.load(order + s).to(tl.int32)
        else:
            place = s
        one = tl.full((BLOCK_T,), 1.0, select.dtype.element_ty)
        tl.store(select + t.to(tl.int64) * (S + R) + place, one, mask=t < tokens)


SIGNATURE = {
    'x': '*bf16',
    'weight': '*bf16',
    'bias': '*bf16',
    'order': '*i64',
    'select': '*bf16',
    'tokens': 'i32',
    'keep': 'i32',
    'threshold': 'fp32',
    'xt': 'i32',
}
CONSTANTS = {
    'xd': 1,
    'COUNTS': True,
    'ORDERED': False,
    'S': 0,
    'R': 8,
    'D': 2048,
    'BLOCK_T': 16,
    'BLOCK_R': 16,
    'BLOCK_K': 32,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
