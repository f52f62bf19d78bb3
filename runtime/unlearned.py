"""Selections and scores that no router learns: a unit given by id, expected activation sparsity."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.rule import Selection


def given(ids: Tensor, units: int, *, dtype: torch.dtype = torch.float32) -> Selection:
    """The unit that each token's id names, weight one: no scores, no gradient.

    Modalities (Mixture-of-Transformers, arXiv:2411.04996; Mixture-of-Mamba, arXiv:2501.16295).

    Args:
        ids: integers (...), each below ``units``. Identical copies give the dense layer.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < units:
        raise BadInput(f"ids from {int(ids.min())} to {int(ids.max())} name no {units} units")
    mask = torch.arange(units, device=ids.device) == ids.unsqueeze(-1)
    return Selection(mask, mask.to(dtype))


def sparsity_scores(x: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scores by the activation sparsity that each expert is expected to have (MoE-X, 2503.07639).

    The weights into an expert's neurons are taken as Gaussian, independent per input, with their
    means and variances over the neurons; a pre-activation is then Gaussian, and a ReLU leaves it
    positive with probability ``(1 + erf(mean / (sqrt(2) * deviation))) / 2``. The score is minus
    that fraction of active neurons, so the expert that is expected to be sparsest scores highest.
    Costs two products (D, N) instead of the experts' own.

    Args:
        x: (..., D); up: (N, m, D), one neuron per row; bias: (N, m) or None.

    Returns:
        (..., N), between -1 and 0, in float32 or wider.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    x, up = x.to(wide), up.to(wide)
    bias = up.new_zeros(up.shape[:2]) if bias is None else bias.to(wide)
    return -expected_active(
        x, up.mean(1), bias.mean(1), up.var(1, correction=0), bias.var(1, correction=0)
    )


def expected_active(
    x: Tensor, mean: Tensor, bias: Tensor, variance: Tensor, bias_variance: Tensor
) -> Tensor:
    """The fraction of an expert's neurons expected to have a positive pre-activation.

    Args:
        x: (..., D); mean, variance: (N, D) of the weights into each expert's neurons; bias,
            bias_variance: (N,) of their biases. All of one dtype.

    Returns:
        (..., N), between 0 and 1.
    """
    centre = torch.nn.functional.linear(x, mean, bias)
    width = torch.nn.functional.linear(x.square(), variance, bias_variance)
    spread = width > torch.finfo(x.dtype).tiny
    # Neurons that are all alike (one neuron, or x = 0) are all active or none is; the formula's
    # slope has no bound there, so no gradient is taken. erf(10) is 1 in float64.
    z = centre / (2 * width).where(spread, 1).sqrt()
    z = z.where(spread, 10 * centre.detach().sign())
    return (1 + torch.erf(z)) / 2
