"""group_tokens: written by sparsify 0.1.0 (sparsify compile --emit-triton).

The source that Triton compiles, for reading and for trying changes; sparsify runs its
own copy. SIGNATURE, CONSTANTS and LAUNCH are one specialisation, the one whose facts the
tests hold; at run time sizes are those of the call.
"""

import triton
import triton.language as tl


@triton.jit
def group_tokens(
    select,  # (rows, tokens, units), zero where dead
    order,  # (rows * units, tokens) int32: live tokens ascending, then dead ones descending
    count,  # (rows * units,) int32: live tokens
    units,
    tokens,
    stride_row,
    stride_token,
    stride_unit,
    BLOCK: tl.constexpr,
):
    """The tokens of one unit (of one batch row), live ones first."""
    pair = tl.program_id(0)
    base = select + (pair // units).to(tl.int64) * stride_row + (pair % units) * stride_unit
    live = 0
    dead = 0
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < tokens
        chosen = tl.load(base + t.to(tl.int64) * stride_token, mask=inside, other=0)
        yes = ((chosen != 0) & inside).to(tl.int32)
        no = inside.to(tl.int32) - yes
        front = live + tl.cumsum(yes, 0) - yes
        back = tokens - 1 - (dead + tl.cumsum(no, 0) - no)
        place = tl.where(yes > 0, front, back)
        tl.store(order + pair.to(tl.int64) * tokens + place, t, mask=inside)
        live += tl.sum(yes, 0)
        dead += tl.sum(no, 0)
    tl.store(count + pair, live)


SIGNATURE = {
    'select': '*fp32',
    'order': '*i32',
    'count': '*i32',
    'units': 'i32',
    'tokens': 'i32',
    'stride_row': 'i32',
    'stride_token': 'i32',
    'stride_unit': 'i32',
}
CONSTANTS = {
    'BLOCK': 1024,
}
LAUNCH = {'num_warps': 4, 'num_stages': 2}
