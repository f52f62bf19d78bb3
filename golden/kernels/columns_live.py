"""columns_live: written by sparsify 0.1.0 (sparsify compile --emit-triton).

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
def columns_live(
    select,  # (T, H)
    index,  # (tiles, H) int32: units live for some token of the tile
    count,  # (tiles,) int32
    tokens,
    units,
    stride_token,
    stride_unit,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of tokens: the list of the units that any of them uses."""
    tile = tl.program_id(0)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    found = 0
    for start in range(0, units, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = (t < tokens)[:, None] & (h < units)[None, :]
        chosen = tl.load(
            select + t[:, None].to(tl.int64) * stride_token + h[None, :] * stride_unit,
            mask=inside,
            other=0,
        )
        used = tl.max(((chosen != 0) & inside).to(tl.int32), 0)
        found = append(index + tile * units, h, used, found)
    tl.store(count + tile, found)


SIGNATURE = {
    'select': '*fp32',
    'index': '*i32',
    'count': '*i32',
    'tokens': 'i32',
    'units': 'i32',
    'stride_token': 'i32',
    'stride_unit': 'i32',
}
CONSTANTS = {
    'BLOCK_T': 64,
    'BLOCK_H': 32,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
