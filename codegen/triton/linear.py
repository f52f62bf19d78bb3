"""Routed linear with input (column) sparsity: every token reads the weights of its live features.

``y[t] = sum over live j of (x[t, j] - centre[j]) * columns[j] + offset + bias``, where j is live
for t if ``|x[t, j] - centre[j]| * scale[j] > threshold`` (TEAL, arXiv:2408.14690;
:class:`sparsify.runtime.inputs.RoutedLinear`). ``columns`` is (in, out): a live feature is one run
of memory.

* One token (``linear_gemv``): masked loads, so dead rows are not fetched; split over inputs.
* More (``linear_live``, ``linear_gemm``): the features that are live for some token of a
  tile are listed, and the product runs over that list only. What is dead for the whole tile is
  neither read nor multiplied; what is dead for single tokens is a zero in the left matrix.

Partial sums are float32 and are added in order (:mod:`sparsify.codegen.triton.parts`): results do
not vary from run to run. Backward is eager (two masked matrix products): in training, where nearly
every feature lives for some token, it is a dense product anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify.codegen.triton.host import precision, rowwise, splits, token_tile
from sparsify.codegen.triton.linear_kernels import linear_gemm, linear_gemv, linear_live
from sparsify.codegen.triton.parts import add_parts
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample
from sparsify.core import Refused
from sparsify.runtime.inputs import RoutedLinear


@torch.library.custom_op("sparsify::routed_linear", mutates_args=())
def routed_linear(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    centre: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """x (T, in) -> y (T, out), and int64 (2,): live pairs, and pairs that were multiplied."""
    x, columns = rowwise(x), columns.contiguous()
    tokens, inputs = x.shape
    outputs = columns.shape[1]
    y = x.new_empty(tokens, outputs)
    if not tokens:
        return y, torch.zeros(2, dtype=torch.int64, device=x.device)
    middle = scale if centre is None else centre
    if tokens == 1:
        width = 128
        blocks = triton.cdiv(outputs, width)
        split = splits(blocks, inputs, 1)
        part = x.new_empty(split, 1, outputs, dtype=torch.float32)
        pairs = torch.empty(split, dtype=torch.int32, device=x.device)
        linear_gemv[(blocks, split)](
            x, columns, scale, middle, part, pairs, inputs, outputs, threshold,
            CENTRED=centre is not None, SPLIT=split, BLOCK_K=32, BLOCK_OUT=width,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return add_parts(part, offset, bias, y), pairs.sum().expand(2).clone()
    tile = token_tile(tokens)
    tiles = triton.cdiv(tokens, tile)
    index = torch.empty(tiles, inputs, dtype=torch.int32, device=x.device)
    count = torch.empty(tiles, 2, dtype=torch.int32, device=x.device)
    linear_live[(tiles,)](
        x, scale, middle, index, count, tokens, inputs, x.stride(0), threshold,
        CENTRED=centre is not None, BLOCK_T=tile, BLOCK_K=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    width, depth = (64, 64) if tile < 64 else (128, 32)
    blocks = triton.cdiv(outputs, width)
    split = splits(tiles * blocks, inputs, tokens)
    shape = (tokens, outputs) if split == 1 else (split, tokens, outputs)
    part = y if split == 1 else x.new_empty(shape, dtype=torch.float32)
    linear_gemm[(tiles, blocks, split)](
        x, columns, scale, middle,
        y if offset is None else offset, y if bias is None else bias,
        index, count, part, tokens, inputs, outputs, x.stride(0), threshold,
        CENTRED=centre is not None, OFFSET=offset is not None, BIAS=bias is not None,
        SPLIT=split, BLOCK_T=tile, BLOCK_K=depth, BLOCK_OUT=width, PRECISION=precision(x),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if split > 1:
        add_parts(part, offset, bias, y)
    sizes = torch.full((tiles,), tile, device=x.device)
    sizes[-1] = tokens - (tiles - 1) * tile
    return y, torch.stack([count[:, 1].sum(), (count[:, 0] * sizes).sum()])


@routed_linear.register_fake
def _(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    centre: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], columns.shape[1]), x.new_empty(2, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, columns, scale, centre, offset, bias, threshold = inputs
    ctx.save_for_backward(x, columns, scale, centre)
    ctx.threshold = threshold
    ctx.dtypes = [None if v is None else v.dtype for v in (offset, bias)]


def _backward(ctx: Any, g: Tensor, _counted: Any) -> tuple[Tensor | None, ...]:
    """Eager: the live part of x times g, and g times the columns where live."""
    x, columns, scale, centre = ctx.saved_tensors
    centred = x if centre is None else x - centre
    live = centred.float().abs() * scale > ctx.threshold
    left = centred.masked_fill(~live, 0.0).to(columns.dtype)
    g = g.to(columns.dtype)
    dx = (g @ columns.t()).masked_fill(~live, 0.0).to(x.dtype)
    row = g.sum(0)
    offset, bias = (None if dtype is None else row.to(dtype) for dtype in ctx.dtypes)
    return dx, left.t() @ g, None, None, offset, bias, None


routed_linear.register_autograd(_backward, setup_context=_save)


class LinearKernel:
    """The kernel of a :class:`RoutedLinear`; takes the tensors from the module at every call."""

    specs = ("linear_gemv", "linear_live", "linear_gemm", "split_sum")

    def __call__(self, module: RoutedLinear, *inputs: Tensor) -> Tensor | None:
        """x (..., in) -> (..., out); None where everything is live: the dense product is best."""
        (x,) = inputs
        select = module.select
        if select.all_live or x.dtype != module.columns.dtype or x.numel() == 0:
            return None
        threshold = select.threshold
        if isinstance(threshold, Tensor):
            return None
        rows = x.reshape(-1, x.shape[-1])
        centre = None if select.centre is None else select.centre.to(x.dtype)
        y, counted = routed_linear(
            rows, module.columns, select.scale, centre, module.offset, module.bias, threshold
        )
        pairs, multiplied = counted.tolist()
        module.counter.seen(len(rows), rows.shape[1], pairs)
        module.counter.rows += multiplied
        result: Tensor = y.view(*x.shape[:-1], y.shape[1])
        return result


def lower(module: RoutedLinear) -> LinearKernel:
    """The module's kernel; Refused where there is none."""
    if module.select.rule != "threshold":
        raise Refused(
            f"{module.select.rule} ranks all features of a token before any is read",
            suggestion="the threshold rule judges each feature alone",
        )
    return LinearKernel()


# ---------------------------------------------------------------------------- specs


def _sample(tokens: int, inputs: int, outputs: int) -> Sample:
    """Half of the features live, the same for all tokens (as much as can be skipped)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator).half()
    dead = torch.rand(inputs, generator=generator) < 0.5
    x = torch.where(dead, 0.0, x.sign() + x).half()
    columns = torch.zeros(inputs, outputs, dtype=torch.float16)
    scale = torch.ones(inputs)
    live = int((x.float().abs() > 0.5).any(0).sum())
    # x, the scale, live rows of the weights, the result
    least = tokens * inputs * 2 + inputs * 4 + live * outputs * 2 + tokens * outputs * 2
    return Sample(lambda: routed_linear(x, columns, scale, None, None, None, 0.5), least)


_GEMM = {
    "CENTRED": False,
    "OFFSET": False,
    "BIAS": False,
    "PRECISION": "tf32",
}
_INTS = {"tokens": "i32", "inputs": "i32", "outputs": "i32", "stride_x": "i32", "threshold": "fp32"}
_POINTERS = {
    "x": "*bf16",
    "columns": "*bf16",
    "scale": "*fp32",
    "centre": "*bf16",
    "offset": "*bf16",
    "bias": "*bf16",
    "index": "*i32",
    "count": "*i32",
}

SPECS = (
    KernelSpec(
        "linear_gemv",
        linear_gemv,
        {
            "x": "*bf16",
            "columns": "*bf16",
            "scale": "*fp32",
            "centre": "*bf16",
            "part": "*fp32",
            "pairs": "*i32",
            "inputs": "i32",
            "outputs": "i32",
            "threshold": "fp32",
        },
        {"CENTRED": True, "SPLIT": 4, "BLOCK_K": 32, "BLOCK_OUT": 128},
        aligned=("inputs", "outputs"),
        sample=lambda: _sample(1, 1024, 2048),
    ),
    KernelSpec(
        "linear_live",
        linear_live,
        {
            **{n: _POINTERS[n] for n in ("x", "scale", "centre", "index", "count")},
            **{n: _INTS[n] for n in ("tokens", "inputs", "stride_x", "threshold")},
        },
        {"CENTRED": True, "BLOCK_T": 64, "BLOCK_K": 64},
        aligned=("inputs", "stride_x"),
    ),
    KernelSpec(
        "linear_gemm",
        linear_gemm,
        {**_POINTERS, "y": "*bf16", **_INTS},
        {**_GEMM, "BIAS": True, "SPLIT": 1, "BLOCK_T": 64, "BLOCK_K": 32, "BLOCK_OUT": 128},
        num_stages=3,
        aligned=("inputs", "outputs", "stride_x"),
        gemm=True,
        sample=lambda: _sample(64, 576, 1536),
    ),
    KernelSpec(
        "linear_gemm_few",
        linear_gemm,
        {**_POINTERS, "y": "*fp32", **_INTS},
        {**_GEMM, "SPLIT": 8, "BLOCK_T": 16, "BLOCK_K": 64, "BLOCK_OUT": 64},
        num_stages=3,
        aligned=("inputs", "outputs", "stride_x"),
        gemm=True,
        sample=lambda: _sample(8, 1024, 1024),
    ),
)
