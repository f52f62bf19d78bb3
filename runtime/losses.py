"""Losses that keep routers healthy while a converted model trains.

``balance_loss`` is the Switch Transformer's load balancing (Fedus et al., arXiv:2101.03961, eq. 4)
and ``z_loss`` the router z-loss of ST-MoE (Zoph et al., arXiv:2202.08906, eq. 5), both averaged
over the model's routers. Run the forward under ``recording(model)``, then add them to the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.router import Router


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Within it, every router of ``model`` keeps the scores and selection of its latest call."""
    routers = _routers(model)
    for router in routers:
        router.keep = True
    try:
        yield
    finally:
        for router in routers:
            router.keep, router.last = False, None


def balance(scores: Tensor, select: Tensor) -> Tensor:
    """Load balance of one router; 1 when tokens spread evenly, up to R when all take one unit.

    Args:
        scores: (..., R); select: (..., R), the routed units' part of the selection.
    """
    units = scores.shape[-1]
    live = (select != 0).to(scores.dtype).reshape(-1, units).mean(0)
    load = live / live.sum().clamp_min(torch.finfo(scores.dtype).tiny)
    wish = torch.softmax(scores, dim=-1).reshape(-1, units).mean(0)
    return units * (load * wish).sum()


def z(scores: Tensor) -> Tensor:
    """Mean squared log-sum-exp of one router's scores (..., R)."""
    return torch.logsumexp(scores, dim=-1).square().mean()


def balance_loss(model: nn.Module) -> Tensor:
    """Mean :func:`balance` of the routers that ran under :func:`recording`."""
    return torch.stack([balance(s, w) for s, w in _kept(model)]).mean()


def z_loss(model: nn.Module) -> Tensor:
    """Mean :func:`z` of the routers that ran under :func:`recording`."""
    return torch.stack([z(s) for s, _ in _kept(model)]).mean()


def _routers(model: nn.Module) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router) and m.routed]


def _kept(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(scores, selection of the routed units) per router."""
    kept = [(r.last[0], r.last[1][..., r.shared :]) for r in _routers(model) if r.last is not None]
    if not kept:
        raise BadInput(
            "no router has kept its scores",
            help="run the forward, and compute the loss, inside `with recording(model):`",
        )
    return kept
