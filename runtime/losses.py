"""Losses that keep routers healthy while a converted model trains.

``balance_loss`` is the Switch Transformer's load balancing (Fedus et al., arXiv:2101.03961, eq. 4)
and ``z_loss`` the router z-loss of ST-MoE (Zoph et al., arXiv:2202.08906, eq. 5), both averaged
over the model's routers. Run the forward under ``recording(model)``, then add them to the loss.

For single rules: ``moh_balance_loss`` (heads), ``null_balance_loss`` (AdaMoE), ``choice_loss``
(expert choice, so that it can decode), ``task_contrast`` (T2MIR), and ``correct``, which is no loss
but the bias update of DeepSeek-V3. MoGE needs none: its groups are balanced by construction. Losses
on how many units are live are in :mod:`sparsify.runtime.sparsity_losses`.
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
            router.keep, router.last, router.last_aux = False, None, {}


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


# ---------------------------------------------------------------------------- for single rules


def moh_balance(scores: Tensor, select: Tensor) -> Tensor:
    """Load balance of routed heads (MoH, arXiv:2410.11842, eq. 6, scaled as its code is).

    ``R * sum of f_i P_i`` with f_i the fraction of tokens that use head i, P_i its mean softmax
    score; with k of R heads live, k when balanced.

    Args:
        scores: (..., R); select: (..., R), the routed heads' part of the selection.
    """
    units = scores.shape[-1]
    live = (select != 0).to(scores.dtype).reshape(-1, units).mean(0)
    return units * (live * torch.softmax(scores, dim=-1).reshape(-1, units).mean(0)).sum()


def null_balance(scores: Tensor, extra: Tensor, select: Tensor, null: Tensor) -> Tensor:
    """Load balance that takes the null units as one pool (AdaMoE, arXiv:2406.13233, eq. 5).

    As :func:`balance` over R + m units, but every null has the mean load of all nulls: tokens may
    use any of them, only their number counts. 1 when even.

    Args:
        scores: (..., R); extra: (..., m), the nulls' scores; select: (..., R) and null: (..., m),
            nonzero where chosen.
    """
    units, nulls = scores.shape[-1], extra.shape[-1]
    both = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
    chosen = torch.cat([select != 0, null != 0], dim=-1).to(scores.dtype)
    live = chosen.reshape(-1, units + nulls).mean(0)
    live = torch.cat([live[:units], live[units:].mean().expand(nulls)])
    load = live / live.sum().clamp_min(torch.finfo(scores.dtype).tiny)
    wish = torch.softmax(both, dim=-1).reshape(-1, units + nulls).mean(0)
    return (units + nulls) * (load * wish).sum()


def choice(scores: Tensor, select: Tensor) -> Tensor:
    """Binary cross entropy that makes a score's sign tell whether its token was chosen.

    The auxiliary loss of Mixture-of-Depths (arXiv:2404.02258, section 3.5) and
    Mixture-of-Recursions (arXiv:2507.10524): the choice among a sequence's tokens is the target of
    each score by itself.

    Args:
        scores: (..., R); select: (..., R), nonzero where chosen.
    """
    target = (select != 0).to(scores.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(scores, target)


def task_contrast(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """InfoNCE between two views of each task (T2MIR, arXiv:2506.05426): routing tells tasks apart.

    The similarity is bilinear, ``q W k``; the other tasks of the batch are the negatives.

    Args:
        query: (B, R), a task router's mean scores on one part of each task's context.
        key: (B, R), on another part of the same tasks, from a momentum copy of the router (no
            gradient).
        weight: (R, R), learnt.
    """
    if query.shape != key.shape or query.dim() != 2:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise BadInput(f"queries and keys must be (tasks, units) alike, not {shapes}")
    logits = query @ weight @ key.detach().t()
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(query), device=query.device))


@torch.no_grad()
def correct(model: nn.Module, rate: float = 0.001) -> None:
    """Move the correction biases of routers that balance so, after a step under :func:`recording`.

    ``b += rate * sign(mean load - load)``: units with less than their share of the tokens become
    likelier, without a gradient (Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437).
    """
    for router in ran(model):
        if router.correction is not None:
            assert router.last is not None  # ran
            select = router.last[1][..., router.shared :].reshape(-1, router.routed)
            load = (select != 0).float().sum(0)
            router.correction += rate * (load.mean() - load).sign().to(router.correction)


def moh_balance_loss(model: nn.Module) -> Tensor:
    """Mean :func:`moh_balance` of the routers that ran under :func:`recording`."""
    return torch.stack([moh_balance(s, w) for s, w in _kept(model)]).mean()


def null_balance_loss(model: nn.Module) -> Tensor:
    """Mean :func:`null_balance` of the routers with null units."""
    found = []
    for router in ran(model, "null"):
        assert router.last is not None  # ran
        scores, select = router.last
        aux = router.last_aux
        found.append(null_balance(scores, aux["extra"], select[..., router.shared :], aux["null"]))
    return torch.stack(found).mean()


def choice_loss(model: nn.Module) -> Tensor:
    """Mean :func:`choice` of the routers whose units choose their tokens."""
    found = []
    for router in ran(model, "expert-choice"):
        assert router.last is not None  # ran
        scores, select = router.last
        found.append(choice(scores, select[..., router.shared :]))
    return torch.stack(found).mean()


def _routers(model: nn.Module) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router) and m.routed]


def ran(model: nn.Module, rule: str | None = None) -> list[Router]:
    """Routers (of one rule) that ran under :func:`recording`; BadInput where there is none."""
    found = [r for r in _routers(model) if r.last is not None and rule in (None, r.rule)]
    if not found:
        which = "router" if rule is None else f"{rule} router"
        raise BadInput(
            f"no {which} has kept its scores",
            help="run the forward, and compute the loss, inside `with recording(model):`",
        )
    return found


def _kept(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(scores, selection of the routed units) per router."""
    kept = []
    for router in ran(model):
        assert router.last is not None  # ran
        kept.append((router.last[0], router.last[1][..., router.shared :]))
    return kept
