"""linear_live: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def append(listed, values, used, found):
    """``values`` where ``used`` (0 or 1) go behind the ``found`` that are listed; how many then."""
    place = found + tl.cumsum(used, 0) - used
    tl.store(listed + place, values, mask=used > 0)
    return found + tl.sum(used, 0)


@triton.jit
def linear_live(
    x,  # (T, in)
    scale,
    centre,
    index,  # (tiles, in) int32: features live for some token of the tile, ascending
    count,  # (tiles, 2) int32: how many, and live (token, feature) pairs
    tokens,
    inputs,
    stride_x,
    threshold,
    CENTRED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of tokens: the list of the features that any of them uses."""
    tile = tl.program_id(0)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    found = 0
    pairs = 0
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (t < tokens)[:, None] & (k < inputs)[None, :]
        value = tl.load(x + t[:, None].to(tl.int64) * stride_x + k[None, :], mask=inside, other=0.0)
        if CENTRED:
            middle = tl.load(centre + k, mask=k < inputs, other=0.0).to(value.dtype)
            value = value - middle[None, :]
        weight = tl.load(scale + k, mask=k < inputs, other=0.0)
        live = ((tl.abs(value.to(tl.float32)) * weight[None, :] > threshold) & inside).to(tl.int32)
        used = tl.max(live, 0)
        found = append(index + tile.to(tl.int64) * inputs, k, used, found)
        pairs += tl.sum(tl.sum(live, 1), 0)
    tl.store(count + 2 * tile, found)
    tl.store(count + 2 * tile + 1, pairs)


SIGNATURE = {
    'x': '*bf16',
    'scale': '*fp32',
    'centre': '*bf16',
    'index': '*i32',
    'count': '*i32',
    'tokens': 'i32',
    'inputs': 'i32',
    'stride_x': 'i32',
    'threshold': 'fp32',
}
CONSTANTS = {
    'CENTRED': True,
    'BLOCK_T': 64,
    'BLOCK_K': 64,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
