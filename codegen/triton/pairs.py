"""The (token, expert) pairs of a selection, sorted by expert, without the host knowing how many.

``slot[p] = token * N + expert`` of pair p; pairs are in the order of experts, and of tokens within
one expert. ``starts[b, e]`` is the first pair of expert e whose token is in block b or later
(blocks of ``BLOCK`` tokens), so ``starts[b, e]`` to ``starts[b + 1, e]`` are the pairs of that expert and
block, and row 0 and the last row bound all of an expert's. Ranks are prefix sums, not atomics:
the order does not vary from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.spec import KernelSpec

BLOCK = 64  # tokens


@triton.jit
def count_pairs(
    select,  # (T, N)
    counts,  # (blocks, N) int32
    tokens,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Pairs of each expert in one block of tokens."""
    block = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (t < tokens)[:, None] & (n < N)[None, :]
    chosen = tl.load(select + t[:, None] * N + n[None, :], mask=inside, other=0.0)
    tl.store(counts + block * N + n, tl.sum((chosen != 0.0).to(tl.int32), 0), mask=n < N)


@triton.jit
def place_pairs(
    select,  # (T, N)
    counts,  # (blocks, N) int32
    slot,  # (P,) int32
    starts,  # (blocks + 1, N) int32
    tokens,
    blocks,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Where the pairs of one block of tokens go."""
    block = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    before = tl.zeros((BLOCK_N,), tl.int32)
    total = tl.zeros((BLOCK_N,), tl.int32)
    for b in range(blocks):
        count = tl.load(counts + b * N + n, mask=n < N, other=0)
        before += tl.where(b < block, count, 0)
        total += count
    start = tl.cumsum(total, 0) - total + before
    tl.store(starts + block * N + n, start, mask=n < N)
    if block == blocks - 1:
        tl.store(starts + blocks * N + n, tl.cumsum(total, 0), mask=n < N)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (t < tokens)[:, None] & (n < N)[None, :]
    chosen = tl.load(select + t[:, None] * N + n[None, :], mask=inside, other=0.0) != 0.0
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    place = start[None, :] + rank
    tl.store(slot + place, t[:, None] * N + n[None, :], mask=chosen)


def sort_pairs(select: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """select (T, N), contiguous -> slot (most,), starts (blocks + 1, N).

    Args:
        most: a bound on the number of pairs that the host knows; slots past the last pair hold
            T * N.
    """
    tokens, experts = select.shape
    blocks = triton.cdiv(tokens, BLOCK)
    slot = torch.full((most,), tokens * experts, dtype=torch.int32, device=select.device)
    counts = torch.empty((blocks, experts), dtype=torch.int32, device=select.device)
    starts = torch.empty((blocks + 1, experts), dtype=torch.int32, device=select.device)
    sizes = {"N": experts, "BLOCK_N": triton.next_power_of_2(experts), "BLOCK_T": BLOCK}
    count_pairs[(blocks,)](select, counts, tokens, **sizes)
    place_pairs[(blocks,)](select, counts, slot, starts, tokens, blocks, **sizes)
    return slot, starts


_SIZES = {"N": 64, "BLOCK_N": 64, "BLOCK_T": BLOCK}
SPECS: tuple[KernelSpec, ...] = (
    KernelSpec(
        "count_pairs", count_pairs, {"select": "*bf16", "counts": "*i32", "tokens": "i32"}, _SIZES
    ),
    KernelSpec(
        "place_pairs",
        place_pairs,
        {"select": "*bf16", "counts": "*i32", "slot": "*i32", "starts": "*i32"}
        | {"tokens": "i32", "blocks": "i32"},
        _SIZES,
    ),
)
