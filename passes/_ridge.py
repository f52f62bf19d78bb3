"""Routers fitted to calibration data, and what stands in for dead units.

Ridge regression on log energy; least squares of what is lost.

Shapes: T calibration tokens, D width, R routed units.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.runtime.ffn import RoutedFFN

FLOOR = 1e-12  # energies are floored here, relative to their mean, before the logarithm
RIDGE = 0.1  # relative to the mean variance of the inputs; 0.001 to 0.1 differ by under 1 %
SHRINK = 0.02  # of the compensation towards the plain means
CHUNK = 1024  # tokens whose pairs of units are held at a time


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


def dead_centre(x: Tensor, scale: Tensor, dead: float = 0.5, steps: int = 3) -> Tensor:
    """What dead features are on average, where those near it die.

    The mean of all values is drawn away by the large ones, which are live. On SmolLM2's hidden
    neurons at 35 % live, zero leaves less of an error than the mean, and this a sixth less.

    Args:
        x: (T, D); scale: (D,) what a feature's distance from the centre counts for.
        dead: share of all values that die, the lowest scores; steps: of the fixed point.

    Returns:
        (D,), in the dtype of x.
    """
    values = x.float()
    centre = values.mean(0)
    for _ in range(steps):
        away = values - centre
        scores = away.abs() * scale
        cut = scores.flatten().kthvalue(max(int(dead * scores.numel()), 1)).values
        dying = scores <= cut
        centre = centre + (away * dying).sum(0) / dying.sum(0).clamp_min(1)
    return centre.to(x.dtype)


def relative_losses(energy: Tensor, samples: Mapping[str, Tensor]) -> Tensor | None:
    """What dead units cost, on one scale for all layers: relative to the stream they add to.

    Args:
        energy: (T, R) squared norms of what is lost; samples: a region's, with ``stream.energy``
            (T, 1) where it adds to a stream.

    Returns:
        (T, R), or None where it adds to none.
    """
    stream = samples.get("stream.energy")
    return None if stream is None else energy / stream.clamp_min(1e-30)


def fit_stand_ins(module: RoutedFFN, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in for the experts that are dead at the present budget.

    Args:
        x: (T, D) inputs of the layer; scores: (T, R) of its router.

    Returns:
        constants (N, D), slopes (R, D), and the layer's result with them (T, D).
    """
    experts, block, _ = module.up.shape
    shared = module.router.shared
    neurons = module.neurons(x)
    columns = module.down.float()
    constants = (neurons.float().mean(0).view(experts, 1, block) @ columns).squeeze(1)
    dead = ~module.router.live(scores, module.router.extra_scores(x))
    routed = neurons[:, shared * block :].float() * dead.repeat_interleave(block, dim=1)
    lost = routed @ columns[shared:].flatten(0, 1)
    constants[shared:], slopes = fit_compensation(dead, scores, lost, constants[shared:])
    y = neurons.float() @ columns.flatten(0, 1) - lost
    y += dead.float() @ constants[shared:] + (scores.float() * dead) @ slopes
    if module.down_bias is not None:
        y += module.down_bias
    return constants, slopes, y.to(x.dtype)


def fit_compensation(
    dead: Tensor, scores: Tensor, lost: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """What to add for each dead unit, by least squares over the calibration tokens.

    Units that are dead tend to be so together, and their output given that they are dead is not
    their mean output: it grows with the router's score. The fit of ``lost`` on the indicators and
    on indicator times score accounts for both; it is shrunk towards the means.

    Args:
        dead: (T, R) 1 where the unit is dead; scores: (T, R) of the router.
        lost: (T, D) the sum of the dead units' outputs; prior: (R, D) their mean outputs.

    Returns:
        constants (R, D) and slopes (R, D): a dead unit adds ``constant + score * slope``.
    """
    dead, scores, lost, prior = dead.double(), scores.double(), lost.double(), prior.double()
    centre, units = scores.mean(0), dead.shape[1]
    features = torch.cat([dead, dead * (scores - centre)], 1)
    gram = features.T @ features
    scale = float(gram.diagonal()[:units].mean())
    if scale == 0:  # nothing is dead
        return prior.float(), torch.zeros_like(prior).float()
    gram.diagonal().mul_(1 + SHRINK).add_(0.25 * SHRINK * scale + 1e-6 * len(dead))
    change: Tensor = torch.linalg.solve(gram, features.T @ (lost - dead @ prior))
    slopes = change[units:]
    constants = prior + change[:units] - centre[:, None] * slopes
    return constants.float(), slopes.float()


def fit_modulation(dead: Tensor, given: Tensor, missing: Tensor) -> Tensor:
    """Vectors by which dead units best multiply what live ones give, by ridge regression.

    ``missing[t, d]`` is fitted by ``given[t, d] * sum of v[e, d] over the units e dead for t``: one
    problem in R unknowns per output d. Shrunk towards zero, which changes nothing.

    Args:
        dead: (T, R) 1 where the unit is dead; given: (T, D) the live units' sum; missing: (T, D)
            what it lacks.

    Returns:
        (R, D).
    """
    dead, given, missing = dead.double(), given.double(), missing.double()
    units, width = dead.shape[1], given.shape[1]
    i, j = torch.triu_indices(units, units)
    half = dead.new_zeros(width, len(i))
    for rows, weight in zip(dead.split(CHUNK), given.square().split(CHUNK), strict=True):
        half.addmm_(weight.T, rows[:, i] * rows[:, j])
    gram = dead.new_empty(width, units, units)
    gram[:, i, j] = gram[:, j, i] = half
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1, keepdim=True)
    diagonal.mul_(1 + SHRINK).add_(0.25 * SHRINK * scale).add_(scale == 0)
    found: Tensor = torch.linalg.solve(gram, (given * missing).T @ dead)
    return found.T.float().contiguous()
