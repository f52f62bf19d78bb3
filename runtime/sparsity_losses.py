"""Losses on how many units are live, for routers that decide by sign (rule ``relu``).

ReMoE (Wang et al., arXiv:2412.14711): an L1 penalty on the gates, weighted by each unit's load so
that it also balances, with a coefficient that adapts until the target sparsity is met
(``l1_loss``, :class:`Adaptive` with ``how="sign"``). PVChat (Shi et al., arXiv:2503.17069) on
routed heads: the same penalty with a coefficient that grows exponentially in the distance to the
target, so that it anneals as the target comes near (``how="distance"``, its smooth proximity
regularisation), and a penalty on too few live heads (``activation_loss``, its head activation
enhancement). Run the forward under ``losses.recording(model)``.

The target is the dial's: with ``set_active(a)``, a share ``1 - budget / R`` of the routed units is
to be dead. Gates are what is above the router's zero point.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.losses import ran
from sparsify.runtime.router import Router

SHARPNESS = 10.0  # of the sigmoid whose slope stands for a live count's (the authors' code)


@dataclasses.dataclass
class Adaptive:
    """A coefficient that follows the sparsity.

    Attributes:
        value: the coefficient; save it with the optimizer's state.
        rate: alpha of ReMoE (1.2), or k of PVChat (its code: 0.1).
        how: ``sign``: ``value *= rate ** sign(target - sparsity)``; ``distance``:
            ``value *= exp(rate * (target - sparsity))``.
    """

    value: float = 1e-8
    rate: float = 1.2
    how: str = "sign"

    def __post_init__(self) -> None:
        if self.how not in ("sign", "distance"):
            raise BadInput(f"no adaptation '{self.how}'", help="sign or distance")

    def update(self, sparsity: float, target: float) -> float:
        """The coefficient for the next step; too dense raises it."""
        gap = target - sparsity
        if self.how == "sign":
            self.value *= self.rate ** ((gap > 0) - (gap < 0))
        else:
            self.value *= math.exp(self.rate * gap)
        return self.value


def l1(gates: Tensor, keep: float, *, balanced: bool = True) -> Tensor:
    """Mean over tokens of the gates' sum, each unit's weighted by its relative load.

    ReMoE eq. 10: the weight is ``R / (k T) * (tokens that use the unit)``, without a gradient: one
    for a unit with its share. ``balanced=False`` is the plain L1 norm (eq. 7).

    Args:
        gates: (..., R), at least 0; keep: k, the target number of live units.
    """
    units = gates.shape[-1]
    rows = gates.reshape(-1, units)
    if balanced:
        load = (rows > 0).to(rows.dtype).mean(0) * units / max(keep, 1e-9)
        rows = rows * load.detach()
    return rows.sum(-1).mean()


def activation(scores: Tensor, target: float) -> Tensor:
    """``exp(2 (sparsity - target)) - 1`` where too sparse, else 0 (PVChat, its HAE loss).

    The live share counts scores above zero; its gradient is a sigmoid's, straight-through.

    Args:
        scores: (..., R), relative to the zero point; target: the share that is to be dead.
    """
    soft = torch.sigmoid(SHARPNESS * scores)
    live = ((scores > 0).to(soft.dtype) - soft).detach() + soft
    sparsity = 1 - live.mean()
    return torch.expm1(2 * (sparsity - target)).clamp_min(0)


def sparsity(model: nn.Module) -> float:
    """The dead share of (token, routed unit) pairs in the recorded calls of ``relu`` routers."""
    found = [(above(r) <= 0).float().mean() for r in ran(model, "relu")]
    return float(torch.stack(found).mean())


def target_sparsity(model: nn.Module) -> float:
    """The share that the dials of the recorded ``relu`` routers want dead."""
    routers = ran(model, "relu")
    return sum(1 - router.budget / router.routed for router in routers) / len(routers)


def l1_loss(model: nn.Module, *, balanced: bool = True) -> Tensor:
    """Mean :func:`l1` of the ``relu`` routers; multiply it by an :class:`Adaptive` value."""
    routers = ran(model, "relu")
    parts = [l1(above(r).relu(), r.budget, balanced=balanced) for r in routers]
    return torch.stack(parts).mean()


def activation_loss(model: nn.Module) -> Tensor:
    """Mean :func:`activation` of the ``relu`` routers."""
    routers = ran(model, "relu")
    return torch.stack([activation(above(r), 1 - r.budget / r.routed) for r in routers]).mean()


def above(router: Router) -> Tensor:
    """(..., R) the recorded scores, relative to the router's zero point."""
    assert router.last is not None  # ran
    at = router.threshold
    finite = isinstance(at, float) and math.isfinite(at)
    return router.last[0] - (at if finite else 0.0)
