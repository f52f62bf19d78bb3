"""Routers fitted to calibration data, and what stands in for dead units.

Ridge regression on log energy; least squares of what is lost.

Shapes: T calibration tokens, D width, R routed units.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12  # energies are floored here, relative to their mean, before the logarithm
RIDGE = 0.1  # relative to the mean variance of the inputs; 0.001 to 0.1 differ by under 1 %
SHRINK = 0.02  # of the compensation towards the plain means


def fit_router(x: Tensor, energy: Tensor, *, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Ridge regression of log energy on the input.

    Args:
        x: (T, D); energy: (T, R), at least 0.

    Returns:
        weight (R, D) and bias (R,) with ``score = x @ weight.T + bias`` near log energy, so one
        threshold serves all units: it is the energy below which a unit is not worth computing.
    """
    x, energy = x.double(), energy.double()
    target = (energy.clamp_min(FLOOR * float(energy.mean()) + 1e-30)).log()
    mean_x, mean_t = x.mean(0), target.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, centred.T @ (target - mean_t))
    return weight.T.contiguous(), mean_t - mean_x @ weight


def fit_compensation(dead: Tensor, lost: Tensor, prior: Tensor) -> Tensor:
    """What to add for each dead unit, by least squares over the calibration tokens.

    Units that are dead tend to be so together, and their output given that they are dead is not
    their mean output; the fit accounts for both and is shrunk towards the means.

    Args:
        dead: (T, R) 1 where the unit is dead; lost: (T, D) the sum of the dead units' outputs.
        prior: (R, D) mean outputs.

    Returns:
        (R, D).
    """
    dead, lost, prior = dead.double(), lost.double(), prior.double()
    gram = dead.T @ dead
    scale = float(gram.diagonal().mean())
    if scale == 0:
        return prior
    gram.diagonal().mul_(1 + SHRINK).add_(0.25 * SHRINK * scale + 1e-6 * len(dead))
    change: Tensor = torch.linalg.solve(gram, dead.T @ (lost - dead @ prior))
    return prior + change
