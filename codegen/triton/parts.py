"""Sums that were made in parts: added in order, so that results do not vary from run to run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsify.codegen.triton.spec import KernelSpec


@triton.jit
def split_sum(
    part,  # (SPLIT, T, out) float32
    offset,
    bias,
    y,  # (T, out)
    total,  # T * out
    outputs,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of a sum, added in order, with what is added to every row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        value += tl.load(part + split * total.to(tl.int64) + at, mask=at < total, other=0.0)
    if OFFSET:
        value += tl.load(offset + at % outputs, mask=at < total, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at % outputs, mask=at < total, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < total)


def add_parts(part: Tensor, offset: Tensor | None, bias: Tensor | None, y: Tensor) -> Tensor:
    """Launch :func:`split_sum`: part (SPLIT, T, out) float32 into y (T, out)."""
    total = y.numel()
    split_sum[(triton.cdiv(total, 512),)](
        part,
        part if offset is None else offset,
        part if bias is None else bias,
        y,
        total,
        y.shape[1],
        OFFSET=offset is not None,
        BIAS=bias is not None,
        SPLIT=part.shape[0],
        BLOCK=512,
    )
    return y


SPECS: tuple[KernelSpec, ...] = (
    KernelSpec(
        "split_sum",
        split_sum,
        {
            "part": "*fp32",
            "offset": "*bf16",
            "bias": "*bf16",
            "y": "*bf16",
            "total": "i32",
            "outputs": "i32",
        },
        {"OFFSET": True, "BIAS": True, "SPLIT": 8, "BLOCK": 512},
        aligned=("total", "outputs"),
    ),
)
