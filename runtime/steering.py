"""Router intervention: turn units up or down at inference, without training.

Adding to the scores of chosen units makes tokens use them more (or, subtracting, less), as in the
study of multilingual routing (Bandarkar et al., arXiv:2510.04694), which steers languages towards
the experts that English uses. The bias acts where the router selects: rules that count keep their
number of units, rules that cut use more or fewer. At budget one everything is live already, so
steering changes nothing there (unless the rule weighs its units).

It is a state of the running model, not of its weights: it is not saved, and ends with the block. A
bias that should stay belongs in the router's own ``bias``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.dial import routers
from sparsify.runtime.router import Router


@contextlib.contextmanager
def steering(
    model: nn.Module,
    units: Mapping[int, float],
    *,
    at: str | None = None,
    pass_name: str | None = None,
    relative: bool = False,
) -> Iterator[list[str]]:
    """Inside, the scores of ``units`` are raised by the given amounts; gives the routers' paths.

    Args:
        units: unit -> what to add; as the routed module numbers them (its experts, its heads).
        at: only routers under these paths, a glob; pass_name: only those of one pass.
        relative: amounts are multiples of the standard deviation of a token's scores.

    Raises:
        BadInput: no router is there, or a unit is shared (always live) or does not exist.
    """
    chosen = [(p, r) for p, r in routers(model, at, pass_name) if isinstance(r, Router)]
    if not chosen:
        raise BadInput(
            f"no router to steer{f' at {at!r}' if at else ''}",
            help="model.active lists the routers",
        )
    biases = [_bias(path, router, units) for path, router in chosen]
    before = [(router.steer, router.steer_relative) for _, router in chosen]
    try:
        for (_, router), bias in zip(chosen, biases, strict=True):
            router.steer, router.steer_relative = bias, relative
        yield [path for path, _ in chosen]
    finally:
        for (_, router), (steer, way) in zip(chosen, before, strict=True):
            router.steer, router.steer_relative = steer, way


def _bias(path: str, router: Router, units: Mapping[int, float]) -> torch.Tensor:
    """(R,) for the router's own numbering."""
    order = list(range(router.units)) if router.order is None else router.order.tolist()
    bias = torch.zeros(router.routed)
    for unit, amount in units.items():
        if unit not in order:
            raise BadInput(f"{path} has no unit {unit}", why=f"it has {router.units}")
        place = order.index(unit) - router.shared
        if place < 0:
            raise BadInput(
                f"unit {unit} of {path} cannot be steered", why="it is shared: always live"
            )
        bias[place] = amount
    return bias.to(router.weight.device)
