"""Routers whose scores and selection a kernel can make by itself, on any target."""

from __future__ import annotations

from torch import Tensor

from sparsify.runtime.router import Router
from sparsify.runtime.rules import TopK
from sparsify.runtime.rules_cut import Threshold


def fuses(router: Router) -> bool:
    """Whether its rule is one that kernels know: top-k or one threshold, live units weigh one."""
    return (
        type(router) is Router
        and type(router.selector) in (TopK, Threshold)
        and router.unit_weights
        and not isinstance(router.threshold, Tensor)
    )


def undisturbed(router: Router) -> bool:
    """Whether nobody watches or bends what it selects (losses, steering, balancing, hooks)."""
    return (
        not router.keep
        and router.steer is None
        and router.extra is None
        and router.correction is None
        and not router._forward_hooks
    )
