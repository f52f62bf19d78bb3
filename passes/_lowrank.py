"""Low-rank factors that are best on the inputs that a layer really gets."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # added to C, relative to its mean diagonal: directions the data lack stay in order


def principal_rows(weight: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Orthonormal (K, R) directions of the outputs ``W x`` and their mean energies (R,), float64.

    The left singular vectors of ``W C^(1/2)``, C the second moment of ``x`` (T, D) (identity
    without): for every rank r, ``U_r U_r^T W`` is the best rank-r approximation of ``W x`` in the
    mean square (Eckart-Young), and the energies after r are what it loses per token.

    Args:
        weight: (K, D).
    """
    wide = weight.double()
    if x is not None:
        second = x.double().T @ x.double() / len(x)
        second.diagonal().add_(FLOOR * second.diagonal().mean().clamp_min(1e-30))
        wide = wide @ torch.linalg.cholesky(second)
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)
    return left[:, : min(weight.shape)], values[: min(weight.shape)].square()
