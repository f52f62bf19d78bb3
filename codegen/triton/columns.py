"""Routed projections by units: live blocks of input columns.

The units that are live for some token of a tile are listed, and the product runs over their
columns. A unit that nobody in a tile uses is neither read nor multiplied. One token takes the
matrix-vector form, which reads live units only.

Backward is eager, unit weights masked (see :mod:`sparsify.codegen.triton.linear`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify.codegen.triton.columns_kernels import columns_gemm, columns_gemv, columns_live
from sparsify.codegen.triton.host import precision, rowwise, splits, token_tile
from sparsify.codegen.triton.parts import add_parts
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample
from sparsify.runtime.heads import RoutedColumns


@torch.library.custom_op("sparsify::routed_columns", mutates_args=())
def routed_columns(
    z: Tensor,
    select: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    dropped: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    """z (T, H*c), select (T, H) weights, blocks (H, c, out) -> (T, out)."""
    z, blocks = rowwise(z), blocks.contiguous()
    tokens, (units, width, outputs) = len(z), blocks.shape
    y = z.new_empty(tokens, outputs)
    if not tokens:
        return y
    where, still = y if places is None else places, y if dropped is None else dropped
    chosen = select.to(z.dtype) if select.dtype == torch.bool else select
    flags = {"DROPPED": dropped is not None, "PLACES": places is not None}
    if tokens == 1:
        blocks_out = triton.cdiv(outputs, 128)
        split = splits(blocks_out, units * width, 1)
        part = z.new_empty(split, 1, outputs, dtype=torch.float32)
        columns_gemv[(blocks_out, split)](
            z, chosen, blocks, still, where, part, units, width, outputs, chosen.stride(1),
            SPLIT=split, BLOCK_K=32, BLOCK_OUT=128, num_warps=4, num_stages=2, **flags,
        )  # fmt: skip
        return add_parts(part, None, bias, y)
    tile = token_tile(tokens)
    tiles = triton.cdiv(tokens, tile)
    index = torch.empty(tiles, units, dtype=torch.int32, device=z.device)
    count = torch.empty(tiles, dtype=torch.int32, device=z.device)
    columns_live[(tiles,)](
        chosen, index, count, tokens, units, *chosen.stride(), BLOCK_T=tile, BLOCK_H=32
    )
    size, depth = (64, 64) if tile < 64 else (128, 32)
    blocks_out = triton.cdiv(outputs, size)
    split = splits(tiles * blocks_out, units * width, tokens)
    shape = (tokens, outputs) if split == 1 else (split, tokens, outputs)
    part = y if split == 1 else z.new_empty(shape, dtype=torch.float32)
    columns_gemm[(tiles, blocks_out, split)](
        z, chosen, blocks, y if bias is None else bias, still, where, index, count, part,
        tokens, units, width, outputs, z.stride(0), *chosen.stride(),
        BIAS=bias is not None, SPLIT=split, BLOCK_T=tile, BLOCK_K=depth, BLOCK_OUT=size,
        BLOCK_H=16, PRECISION=precision(z), num_warps=4, num_stages=3, **flags,
    )  # fmt: skip
    return y if split == 1 else add_parts(part, None, bias, y)


@routed_columns.register_fake
def _(
    z: Tensor,
    select: Tensor,
    blocks: Tensor,
    bias: Tensor | None,
    dropped: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    return z.new_empty(z.shape[0], blocks.shape[2])


def _save_columns(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, select, blocks, bias, dropped, places = inputs
    ctx.save_for_backward(z, select, blocks, places)
    ctx.has = bias is not None, dropped is not None


def _columns_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, select, blocks, places = ctx.saved_tensors
    packed = (z if places is None else z.index_select(1, places)).view(len(z), *blocks.shape[:2])
    weight = select.to(z.dtype)[:, :, None]
    left = (packed * weight).flatten(1)
    back = (g @ blocks.flatten(0, 1).t()).view(packed.shape)
    dz = (back * weight).flatten(1)
    if places is not None:
        dz = torch.zeros_like(dz).index_copy(1, places, dz)
    dselect = None
    if select.is_floating_point():
        dselect = ((back * packed).sum(2) * (select != 0)).to(select.dtype)
    biased, replaced = ctx.has
    dropped = (select == 0).to(g.dtype).t() @ g if replaced else None
    dblocks = (left.t() @ g).view(blocks.shape)
    return dz, dselect, dblocks, g.sum(0) if biased else None, dropped, None


routed_columns.register_autograd(_columns_backward, setup_context=_save_columns)


class ColumnsKernel:
    """The kernel of a :class:`RoutedColumns`."""

    specs = ("columns_live", "columns_gemm", "columns_gemv", "split_sum")

    def __call__(self, module: RoutedColumns, *inputs: Tensor) -> Tensor | None:
        """z (..., in), select (..., H) -> (..., out)."""
        z, select = inputs
        if z.dtype != module.blocks.dtype or z.numel() == 0:
            return None
        units, width, outputs = module.blocks.shape
        flat, chosen = z.reshape(-1, units * width), select.reshape(-1, units)
        live = int((chosen != 0).sum())
        module.counter.seen(len(flat), units, live)
        module.counter.rows += live
        y = routed_columns(flat, chosen, module.blocks, module.bias, module.dropped, module.places)
        result: Tensor = y.view(*z.shape[:-1], outputs)
        return result


def lower(module: RoutedColumns) -> ColumnsKernel:
    """The module's kernel."""
    return ColumnsKernel()


# ---------------------------------------------------------------------------- specs


def _columns_sample(tokens: int) -> Sample:
    select = torch.zeros(tokens, 32)
    select[:, ::2] = 1
    z = torch.zeros(tokens, 2048, dtype=torch.float16)
    blocks = torch.zeros(32, 64, 1024, dtype=torch.float16)
    # live columns of z, the selection, live blocks, the result
    least = z.numel() + select.numel() * 4 + 16 * 64 * 1024 * 2 + tokens * 1024 * 2
    return Sample(lambda: routed_columns(z, select, blocks, None, None, None), least)


def _types(*names: str) -> dict[str, str]:
    known = {"select": "*fp32", "count": "*i32", "index": "*i32", "places": "*i64", "part": "*fp32"}
    pointers = ("z", "blocks", "bias", "dropped", "y")
    return {n: known.get(n, "*bf16" if n in pointers else "i32") for n in names}


SPECS = (
    KernelSpec(
        "columns_live",
        columns_live,
        _types("select", "index", "count", "tokens", "units", "stride_token", "stride_unit"),
        {"BLOCK_T": 64, "BLOCK_H": 32},
    ),
    KernelSpec(
        "columns_gemm",
        columns_gemm,
        _types(
            "z", "select", "blocks", "bias", "dropped", "places", "index", "count", "y", "tokens",
            "units", "width", "outputs", "stride_z", "stride_token", "stride_unit",
        ),
        {
            "BIAS": True, "DROPPED": True, "PLACES": False, "SPLIT": 1, "BLOCK_T": 64,
            "BLOCK_K": 32, "BLOCK_OUT": 128, "BLOCK_H": 16, "PRECISION": "tf32",
        },
        num_stages=3,
        aligned=("width", "outputs", "stride_z"),
        gemm=True,
        sample=lambda: _columns_sample(8),
    ),
    KernelSpec(
        "columns_gemv",
        columns_gemv,
        _types(
            "z", "select", "blocks", "dropped", "places", "part", "units", "width", "outputs",
            "stride_unit",
        ),
        {"DROPPED": True, "PLACES": False, "SPLIT": 4, "BLOCK_K": 32, "BLOCK_OUT": 128},
        aligned=("width", "outputs"),
        sample=lambda: _columns_sample(1),
    ),
)  # fmt: skip
