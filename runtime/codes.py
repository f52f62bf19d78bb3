"""Weights in few bits: integers and one scale per group of them, packed without gaps.

A weight is ``code * scale``, codes from ``-(2 ** (b - 1) - 1)`` to ``2 ** (b - 1) - 1`` (symmetric:
zero is zero, and there is no offset to store). Eight codes of b bits take b bytes, for any b.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 5, 6, 7, 8)  # bits of a code
# Shrinking a scale clips the largest weights and rounds all others less; which of these is best is
# tried for every group. With Gaussian weights the best is near 0.6 at 2 bits and 1 at 8.
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58)


def top_code(bits: int) -> int:
    """The largest code of ``bits`` bits."""
    return int(2 ** (bits - 1)) - 1


def quantised(
    weight: Tensor, bits: int, group: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales, each group's scale the one with the least squared error.

    Args:
        weight: (..., D); bits: one of WIDTHS; group: neighbours of a row that share a scale, a
            divisor of D.
        importance: (..., D), as it broadcasts: what an error counts for, or None = one.

    Returns:
        codes int8 (..., D), and scales float16 (..., D / group). An error is at most half a scale,
        but for weights beyond ``top_code(bits) * scale``, which are clipped.
    """
    parts = weight.detach().float().unflatten(-1, (-1, group))
    counts = 1.0 if importance is None else importance.float().unflatten(-1, (-1, group))
    most = top_code(bits)
    whole = parts.abs().amax(-1) / most
    least, scales = torch.full_like(whole, torch.inf), torch.zeros_like(whole)
    for shrink in SHRINK:
        # rounded as it is stored, before codes are made with it: no error of its own
        scale = (whole * shrink).to(torch.float16).float()
        error = (_codes(parts, scale, most) * scale.unsqueeze(-1) - parts).square()
        loss = (error * counts).sum(-1)
        better = loss < least
        least, scales = torch.where(better, loss, least), torch.where(better, scale, scales)
    codes = _codes(parts, scales, most)
    return codes.to(torch.int8).flatten(-2), scales.to(torch.float16)


def _codes(parts: Tensor, scale: Tensor, most: int) -> Tensor:
    by = torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)
    return (parts / by).round().clamp(-most, most)


def weights_of(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (..., D) and scales (..., D / group) -> weights (..., D)."""
    parts = codes.unflatten(-1, (scales.shape[-1], -1))
    found: Tensor = (parts * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)
    return found


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (n, count) -> uint8 (n, packed_bytes), the first code in the lowest bits."""
    wide = codes.to(torch.int64) + top_code(bits)
    eights = torch.nn.functional.pad(wide, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    # 8 codes of 8 bits fill the sign bit of a word, too: shifted out again, bytes are as they were
    words = (eights << (bits * torch.arange(8, device=codes.device))).sum(2, keepdim=True)
    found: Tensor = (words >> (8 * torch.arange(bits, device=codes.device))) & 255
    return found.to(torch.uint8).flatten(1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: int8 (n, count)."""
    if bits == 8:
        return (packed[:, :count].to(torch.int16) - top_code(8)).to(torch.int8)
    parts = packed.unflatten(1, (-1, bits)).to(torch.int64)
    words = (parts << (8 * torch.arange(bits, device=packed.device))).sum(2, keepdim=True)
    codes: Tensor = (words >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return (codes.flatten(1)[:, :count] - top_code(bits)).to(torch.int8)
