"""An up projection whose neurons are left out where their gate is nearly shut.

Shapes: T calibration tokens, F neurons, P points of an error table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.regions import FeedForward, Projection
from sparsify.runtime.gated import Factor
from sparsify.runtime.inputs import Magnitude


def open_gates(projection: Projection, select: Magnitude) -> tuple[Factor, Factor, Tensor] | None:
    """Selections of inputs and of neurons, and what a shut neuron's result counts as (F,).

    A neuron that is taken to be at its mean loses ``gate * (up - mean)``, which moves the
    prediction as far as the input of the down projection does.

    Args:
        projection: an up projection with samples of its gates; select: of its inputs, calibrated.

    Returns:
        None where that is not known.
    """
    ffn, x = projection.within, projection.samples.get("x")
    gates = projection.samples.get("gate")
    if x is None or gates is None or select.errors is None or not isinstance(ffn, FeedForward):
        return None
    slopes = [p.samples.get("x.slope") for p in ffn.parts if p.role == "down"]
    if not slopes or slopes[0] is None:
        return None
    linear = projection.linear
    bias = None if linear.bias is None else linear.bias.detach().float()
    up = torch.nn.functional.linear(x.float(), linear.weight.detach().float(), bias)
    neurons = Factor(up.std(0) * slopes[0][0].sqrt(), rule="threshold")
    neurons.calibrate(gates, neurons.scores(gates).square())
    assert neurons.errors is not None
    inputs = Factor(
        select.scale, select.centre, rule="threshold", unit_cost=select.unit_cost,
        quantiles=select.quantiles, errors=both(select.errors, neurons.errors),
    )  # fmt: skip
    return inputs, neurons, up.mean(0)


def both(one: Tensor, two: Tensor) -> Tensor:
    """(P,) error table of two selections at the root of a budget each, from their own (P,)."""
    points = len(one)
    budget = 1 - torch.linspace(0, 1, points, dtype=torch.float64)
    at = (1 - budget.sqrt()) * (points - 1)
    low = at.floor().long()
    high = at.ceil().long()
    total = one.double() + two.double()
    return torch.lerp(total[low], total[high], at - low).float()
