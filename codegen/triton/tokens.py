"""Token gather and scatter for depth: live tokens close up, run a layer, and go back to their rows.

``gather_tokens`` packs the live rows of the stream in order; ``scatter_tokens`` puts what the layer
made of them back, and lets the others pass (plus what stands in for the layer). One kernel each,
without a sync, an atomic or an index list: the program of a block of tokens counts the live ones
before it itself (one byte a token, from the cache) and so knows where its rows go. It is what
:class:`sparsify.runtime.depth.RoutedLayer` does around its body.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.host import rowwise
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample


@triton.jit
def live_places(live, tokens, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tokens of the program's block, 1 where they live, and how many live before each."""
    first = tl.program_id(0) * BLOCK_T
    seen = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, first, BLOCK_N):
        before = start + tl.arange(0, BLOCK_N)
        seen += (tl.load(live + before, mask=before < first, other=0) != 0).to(tl.int32)
    t = first + tl.arange(0, BLOCK_T)
    mine = (tl.load(live + t, mask=t < tokens, other=0) != 0).to(tl.int32)
    return t, mine, tl.sum(seen, 0) + tl.cumsum(mine, 0) - mine


@triton.jit
def gather_rows(
    x,  # (N, D)
    live,  # (N,) uint8
    packed,  # (N, D): live rows, then zeros
    index,  # (N,) int32: the token of each packed row, then zeros
    count,  # (1,) int32
    tokens,
    width,
    stride_x,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The live rows of one block of tokens go behind those of the blocks before it.

    Every token writes one row: a dead one a row of zeros, counted from the end.
    """
    t, mine, place = live_places(live, tokens, BLOCK_T, BLOCK_N)
    block = tl.program_id(1)
    if block == 0:
        tl.store(count + t * 0, place + mine, mask=t == tokens - 1)  # by the last token
    place = tl.where(mine > 0, place, tokens - 1 - (t - place))  # t - place are dead before t
    if block == 0:
        tl.store(index + place, tl.where(mine > 0, t, 0), mask=t < tokens)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    moved = (mine > 0)[:, None] & inside
    row = tl.load(x + t[:, None].to(tl.int64) * stride_x + d[None, :], mask=moved, other=0.0)
    tl.store(packed + place[:, None].to(tl.int64) * width + d[None, :], row, mask=inside)


@triton.jit
def scatter_rows(
    packed,  # (N, D)
    x,  # (N, D): what dead tokens keep, where KEEP
    dropped,  # (D,): added to dead tokens, where DROPPED
    live,  # (N,) uint8
    y,  # (N, D)
    tokens,
    width,
    stride_packed,
    stride_x,
    KEEP: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of tokens: packed rows where live, else x (or zero) with what stands in."""
    t, mine, place = live_places(live, tokens, BLOCK_T, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    here = (mine > 0)[:, None] & inside
    row = tl.load(
        packed + place[:, None].to(tl.int64) * stride_packed + d[None, :], mask=here, other=0.0
    )
    if KEEP:
        there = inside & (mine == 0)[:, None]
        rest = tl.load(x + t[:, None].to(tl.int64) * stride_x + d[None, :], mask=there, other=0.0)
        if DROPPED:
            rest += tl.load(dropped + d, mask=d < width, other=0.0).to(rest.dtype)[None, :]
        row = tl.where(here, row, rest)
    tl.store(y + t[:, None].to(tl.int64) * width + d[None, :], row, mask=inside)


_TILE = {"BLOCK_T": 32, "BLOCK_D": 128, "BLOCK_N": 1024}


def _grid(tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(tokens, _TILE["BLOCK_T"]), triton.cdiv(width, _TILE["BLOCK_D"])


@torch.library.custom_op("sparsify::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), live bool (N,) -> packed (N, D), index int32 (N,), count int32 (1,).

    Rows and indices from ``count`` on are zero.
    """
    x = rowwise(x)
    tokens, width = x.shape
    packed = x.new_empty(tokens, width)
    index, count = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (tokens, 1))
    if not x.numel():
        index.zero_()
        count.zero_()
    else:
        mask = live.contiguous().view(torch.uint8)
        gather_rows[_grid(tokens, width)](
            x, mask, packed, index, count, tokens, width, x.stride(0), **_TILE
        )
    return packed, index, count


@gather_tokens.register_fake
def _(x: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = live.new_empty(x.shape[0], dtype=torch.int32)
    return x.new_empty(x.shape), whole, live.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("sparsify::scatter_tokens", mutates_args=())
def scatter_tokens(
    packed: Tensor, live: Tensor, x: Tensor | None, dropped: Tensor | None
) -> Tensor:
    """packed (N, D), live bool (N,), x (N, D) or None (zero), dropped (D,) or None -> (N, D)."""
    packed = rowwise(packed)
    tokens, width = packed.shape
    y = packed.new_empty(tokens, width)
    if packed.numel():
        rest = packed if x is None else rowwise(x)
        scatter_rows[_grid(tokens, width)](
            packed, rest, rest if dropped is None else dropped,
            live.contiguous().view(torch.uint8), y, tokens, width, packed.stride(0), rest.stride(0),
            KEEP=x is not None, DROPPED=dropped is not None, **_TILE,
        )  # fmt: skip
    return y


@scatter_tokens.register_fake
def _(packed: Tensor, live: Tensor, x: Tensor | None, dropped: Tensor | None) -> Tensor:
    return packed.new_empty(packed.shape)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None]:
    """Back to the rows they came from: the other kernel."""
    (live,) = ctx.saved_tensors
    return scatter_tokens(g, live, None, None), None


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, live, x, dropped = inputs
    ctx.save_for_backward(live)
    ctx.has = x is not None, dropped is not None


def _scatter_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Live rows of g packed (the other kernel); the rest is x's."""
    (live,) = ctx.saved_tensors
    packed = gather_tokens(g, live)[0]
    rest = g.masked_fill(live[:, None], 0.0)
    keep, dropped = ctx.has
    return packed, None, rest if keep else None, rest.sum(0) if dropped else None


gather_tokens.register_autograd(_gather_backward, setup_context=_save_gather)
scatter_tokens.register_autograd(_scatter_backward, setup_context=_save_scatter)


# ---------------------------------------------------------------------------- specs


def _sample_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    live = torch.rand(512, generator=generator) < 0.5
    return torch.zeros(512, 1024, dtype=torch.float16), live


def _gather_sample() -> Sample:
    x, live = _sample_inputs()
    # live rows read, all rows written, the mask, the index
    least = int(live.sum()) * 1024 * 2 + 512 * 1024 * 2 + len(live) + 4 * len(live)
    return Sample(lambda: gather_tokens(x, live), least)


def _scatter_sample() -> Sample:
    x, live = _sample_inputs()
    rest = x.clone()
    least = 2 * 512 * 1024 * 2 + len(live)  # every row read once and written once, the mask
    return Sample(lambda: scatter_tokens(x, live, rest, None), least)


SPECS = (
    KernelSpec(
        "gather_rows",
        gather_rows,
        {
            "x": "*bf16",
            "live": "*u8",
            "packed": "*bf16",
            "index": "*i32",
            "count": "*i32",
            "tokens": "i32",
            "width": "i32",
            "stride_x": "i32",
        },
        _TILE,
        aligned=("width", "stride_x"),
        sample=_gather_sample,
    ),
    KernelSpec(
        "scatter_rows",
        scatter_rows,
        {
            "packed": "*bf16",
            "x": "*bf16",
            "dropped": "*bf16",
            "live": "*u8",
            "y": "*bf16",
            "tokens": "i32",
            "width": "i32",
            "stride_packed": "i32",
            "stride_x": "i32",
        },
        {"KEEP": True, "DROPPED": True, **_TILE},
        aligned=("width", "stride_packed", "stride_x"),
        sample=_scatter_sample,
    ),
)
