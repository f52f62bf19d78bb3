"""How far a kernel may be from eager.

Both sides add the same products in another order, so the bound is that of a REORDERED claim
(:meth:`sparsify.core.Claim.tolerance`): ``8.5 * u * sqrt(n) * scale`` for sums of n products, u
half an ulp of float32 and scale the largest value of the result. In a half type the result is
rounded once on each side, and so may be one factor of each product: one ulp of the half type each.
"""

from __future__ import annotations

import torch

from sparsify.core import REORDERED

U = torch.finfo(torch.float32).eps / 2


def close(found: torch.Tensor, wanted: torch.Tensor, length: int) -> None:
    """Assert shape, dtype and values for sums of ``length`` products."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if not wanted.numel():
        return
    scale = max(float(wanted.abs().max()), 1.0)
    allowed = REORDERED.tolerance(U, length, scale)
    if found.dtype != torch.float32:
        allowed += 2 * torch.finfo(found.dtype).eps * scale
    assert float((found - wanted).abs().max()) <= allowed
