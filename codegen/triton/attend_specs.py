"""Specialisations of the attention kernels, and what their traffic is counted on."""

from __future__ import annotations

import torch

from sparsify.codegen.triton.attend_decode import attend_decode, attend_join
from sparsify.codegen.triton.attend_ops import routed_attend, routed_attend_paged
from sparsify.codegen.triton.attend_prefill import attend_prefill
from sparsify.codegen.triton.spec import KernelSpec
from sparsify.codegen.triton.traffic import Sample


def _sample(tokens: int, keys: int, masked: bool = False) -> Sample:
    """8 heads on 4 key/value heads, two of which have live heads, for all tokens."""
    q = torch.zeros(1, 8, tokens, 64, dtype=torch.float16)
    k = torch.zeros(1, 4, keys, 64, dtype=torch.float16)
    select = torch.zeros(1, tokens, 8)
    select[:, :, 2:6] = 1
    v = k.clone()
    mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool) if masked else None
    # live queries, keys and values of live key/value heads, the selection, the result, the mask
    least = q.numel() + 2 * k.numel() + select.numel() * 4 + q.numel() * 2
    least += tokens * keys if masked else 0
    return Sample(lambda: routed_attend(q, k, v, select, mask, 0.125, False, True), least)


def _paged_sample() -> Sample:
    """Two rows of 40 and 25 pages, two of four key/value heads live."""
    q, select = torch.zeros(2, 8, 1, 64, dtype=torch.float16), torch.zeros(2, 1, 8)
    select[:, :, 2:6] = 1
    k = torch.zeros(80, 16, 4, 64, dtype=torch.float16)
    v, table = k.clone(), torch.arange(80, dtype=torch.int32).view(2, 40)
    lengths = torch.tensor([640, 400], dtype=torch.int32)
    # live queries, keys and values of live heads, the pages' numbers, the selection, the result
    least = q.numel() + 2 * 1040 * 2 * 64 * 2 + 65 * 4 + select.numel() * 4 + q.numel() * 2
    return Sample(lambda: routed_attend_paged(q, k, v, table, lengths, select, 0.125), least)


def _types(*names: str) -> dict[str, str]:
    known = {
        "order": "*i32", "count": "*i32", "table": "*i32", "lengths": "*i32", "select": "*fp32",
        "mask": "*i8", "sums": "*fp32", "tops": "*fp32", "scale": "fp32",
    }  # fmt: skip
    return {n: known.get(n, "*bf16" if n in ("q", "k", "v", "y") else "i32") for n in names}


def _strides(letter: str, axes: str) -> tuple[str, ...]:
    return tuple(f"stride_{letter}{a}" for a in axes)


_ALIGNED = (*_strides("q", "bht"), *_strides("k", "bgs"), *_strides("v", "bgs"))
_WIDTHS = {"WIDTH": 128, "VALUE": 128, "BLOCK_D": 128, "BLOCK_V": 128}
_DECODE = _types(
    "q", "k", "v", "mask", "select", "table", "lengths", "sums", "tops", "scale", "kv_heads",
    "shared", "keys", "pages", *_strides("q", "bh"), *_strides("k", "bgs"), *_strides("v", "bgs"),
    *_strides("m", "bhs"), *_strides("l", "bh"),
)  # fmt: skip

SPECS = (
    KernelSpec(
        "attend_prefill",
        attend_prefill,
        _types(
            "q",
            "k",
            "v",
            "mask",
            "order",
            "count",
            "y",
            "scale",
            "heads",
            "shared",
            "tokens",
            "keys",
            *_ALIGNED,
            *_strides("m", "bhts"),
        ),
        {
            "CAUSAL": True,
            "MASK": 0,
            "SAFE": True,
            **_WIDTHS,
            "BLOCK_T": 64,
            "BLOCK_S": 32,
            "PRECISION": "tf32",
        },
        num_warps=8,
        aligned=_ALIGNED,
        gemm=True,
        sample=lambda: _sample(32, 512),
    ),
    KernelSpec(
        "attend_prefill_masked",
        attend_prefill,
        _types(
            "q",
            "k",
            "v",
            "mask",
            "order",
            "count",
            "y",
            "scale",
            "heads",
            "shared",
            "tokens",
            "keys",
            *_ALIGNED,
            *_strides("m", "bhts"),
        ),
        {
            "CAUSAL": False,
            "MASK": 1,
            "SAFE": True,
            **_WIDTHS,
            "BLOCK_T": 64,
            "BLOCK_S": 32,
            "PRECISION": "tf32",
        },
        num_warps=8,
        aligned=_ALIGNED,
        gemm=True,
        sample=lambda: _sample(32, 512, masked=True),
    ),
    KernelSpec(
        "attend_decode",
        attend_decode,
        _DECODE,
        {
            "MASK": 0,
            "PAGE": 0,
            "SPLIT": 8,
            **_WIDTHS,
            "BLOCK_H": 16,
            "BLOCK_S": 64,
            "PRECISION": "tf32",
        },
        aligned=tuple(n for n in _ALIGNED if n != "stride_qt"),
        gemm=True,
        sample=lambda: _sample(1, 2048),
    ),
    KernelSpec(
        "attend_decode_paged",
        attend_decode,
        _DECODE,
        {
            "MASK": 0,
            "PAGE": 16,
            "SPLIT": 8,
            **_WIDTHS,
            "BLOCK_H": 16,
            "BLOCK_S": 64,
            "PRECISION": "tf32",
        },
        aligned=tuple(n for n in _ALIGNED if n != "stride_qt"),
        gemm=True,
        sample=_paged_sample,
    ),
    KernelSpec(
        "attend_join",
        attend_join,
        _types("sums", "tops", "select", "y", "heads", *_strides("l", "bh")),
        {"SAFE": True, "SPLIT": 8, "VALUE": 128, "BLOCK_V": 128},
        num_warps=1,
    ),
)
