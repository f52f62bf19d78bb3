"""Lists of what is live, made on the device without a sync."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.spec import KernelSpec


@triton.jit
def append(listed, values, used, found):
    """``values`` where ``used`` (0 or 1) go behind the ``found`` that are listed; how many then."""
    place = found + tl.cumsum(used, 0) - used
    tl.store(listed + place, values, mask=used > 0)
    return found + tl.sum(used, 0)


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


def grouped(select: Tensor) -> tuple[Tensor, Tensor]:
    """select (rows, T, H) -> order int32 (rows * H, T), count int32 (rows * H,)."""
    rows, tokens, units = select.shape
    order = torch.empty(rows * units, tokens, dtype=torch.int32, device=select.device)
    count = torch.empty(rows * units, dtype=torch.int32, device=select.device)
    group_tokens[(rows * units,)](
        bytes_of(select), order, count, units, tokens, *select.stride(), BLOCK=1024
    )
    return order, count


def bytes_of(mask: Tensor) -> Tensor:
    """Booleans as bytes, which kernels load; others as they are."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


SPECS = (
    KernelSpec(
        "group_tokens",
        group_tokens,
        {"select": "*fp32", "order": "*i32", "count": "*i32"}
        | dict.fromkeys(("units", "tokens", "stride_row", "stride_token", "stride_unit"), "i32"),
        {"BLOCK": 1024},
    ),
)
