"""The best approximations of a weight by products of two smaller ones, on data where there are any.

Shapes: a weight W (K, D) with inputs x (T, D); C = E[x x^T] is their second moment. All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.core import Refused

FLOOR = 1e-6  # added to C, relative to its mean diagonal: directions the data lack stay in order


def check_wide(weight: Tensor) -> None:
    """Refused where the weight's dtype is too narrow for factors that meet a BOUNDED claim."""
    if weight.dtype.itemsize < 4:
        raise Refused(
            "rounding the factors to a half type costs more than the claim allows",
            suggestion="convert in float32, then .to(torch.bfloat16)",
        )


def weighted_svd(weight: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors (K, min(K, D)) and values of ``W C^(1/2)``; of W without samples.

    ``U U^T W`` with the first r columns U is the rank-r weight whose outputs on such inputs are
    nearest to W's in the mean square (Eckart-Young).
    """
    weight = weight.double()
    if x is not None:
        second = x.double().T @ x.double() / len(x)
        second.diagonal().add_(FLOOR * second.diagonal().mean().clamp_min(1e-30))
        weight = weight @ torch.linalg.cholesky(second)
    left, values, _ = torch.linalg.svd(weight, full_matrices=False)
    return left, values


def input_base(weight: Tensor, rank: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """A (K, r) and B (r, D), the rows of B orthonormal, with ``A B`` the best such fit of W.

    Orthonormal rows make latents ``B x`` no larger than x, and rounding a factor no worse than
    rounding W.
    """
    left, _ = weighted_svd(weight, x)
    left = left[:, :rank]
    inner = left.T @ weight.double()
    base = torch.linalg.qr(inner.T).Q
    return left @ (inner @ base), base.T.contiguous()


def output_base(weight: Tensor, rank: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """A (D, r) and B (r, K), the rows of B orthonormal, with ``(A B)^T`` the best such fit of W.

    The shared side is that of W's outputs: B holds the leading eigenvectors of ``W C W^T``, the
    second moment of what W gives; so it needs K x K numbers, where C may have many more.
    """
    weight = weight.double()
    second = weight @ weight.T
    if x is not None:
        floor = FLOOR * float(x.square().mean().clamp_min(1e-30))
        y = (x @ weight.T.to(x)).double()  # a float64 copy of x may be large
        second = y.T @ y / len(x) + floor * second
    base = torch.linalg.eigh(second).eigenvectors.flip(1)[:, :rank]
    return weight.T @ base, base.T.contiguous()
