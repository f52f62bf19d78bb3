"""Matrices in fewer bits, in numpy: codes, scales, and the values that both stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from sparsify.runtime.codes import quantised

BLOCK = 32  # inputs of one output that share a scale at 4 bits
STEP = 1 << 20  # numbers rounded at a time


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A matrix (K, N) in codes.

    Attributes:
        codes: int8 (K, N).
        scales: (blocks of K, N), float16 where that holds them exactly, else float32.
        group: neighbours among K that share a scale.
    """

    codes: Any
    scales: Any
    group: int

    @property
    def values(self) -> Any:
        """float32 (K, N): every code times the scale of its block."""
        wide = np.repeat(self.scales.astype(np.float32), self.group, axis=0)
        return self.codes * wide[: len(self.codes)]


def rounded(matrix: Any, bits: int) -> Rounded:
    """Symmetric codes of ``bits`` bits for a matrix (K, N).

    At 8 bits every output has one scale, at 4 every :data:`BLOCK` of its K inputs; the scales are
    those with the least squared error (:func:`sparsify.runtime.codes.quantised`).
    """
    inputs, outputs = matrix.shape
    group = inputs if bits == 8 else BLOCK
    blocks = -(-inputs // group)
    codes = np.empty((inputs, outputs), np.int8)
    scales = np.empty((blocks, outputs), np.float32)
    by = _towards_one(matrix)
    step = max(STEP // inputs, 1)
    for start in range(0, outputs, step):
        rows = np.ascontiguousarray(matrix[:, start : start + step].T) * by
        rows = np.pad(rows, ((0, 0), (0, blocks * group - inputs)))
        found, by_block = quantised(torch.from_numpy(rows), bits, group)
        codes[:, start : start + step] = found.numpy()[:, :inputs].T
        scales[:, start : start + step] = by_block.float().numpy().T / by
    half = _half(scales)
    return Rounded(codes, scales if half is None else half, group)


def _towards_one(matrix: Any) -> Any:
    """The power of two that brings the largest weight near 1, far from where float16 ends."""
    largest = float(np.abs(matrix).max(initial=0.0))
    return np.float32(2.0 ** -np.floor(np.log2(largest))) if largest > 1e-30 else np.float32(1)


def _half(scales: Any) -> Any | None:
    """Scales as float16; None where that changes one."""
    with np.errstate(over="ignore"):
        found = scales.astype(np.float16)
    return found if np.array_equal(found.astype(np.float32), scales) else None
