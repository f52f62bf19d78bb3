"""decode_hidden_1: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def act(up, gate):
    v0 = 1.0 / (1.0 + tl.exp(-gate))
    v1 = gate * v0
    v2 = v1 * up
    return v2


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


SIGNATURE = {
    'x': '*bf16',
    'up': '*bf16',
    'gate': '*bf16',
    'select': '*bf16',
    'h': '*bf16',
    'tokens': 'i32',
    'xt': 'i32',
}
CONSTANTS = {
    'up_bias': None,
    'gate_bias': None,
    'xd': 1,
    'ACT': act,
    'GATED': True,
    'BIASED': False,
    'GATE_BIASED': False,
    'COLUMNS': 16,
    'BLOCK_K': 128,
    'BLOCK_N': 64,
    'BLOCK_T': 1,
    'N': 64,
    'M': 128,
    'D': 2048,
    'PRECISION': 'tf32',
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
