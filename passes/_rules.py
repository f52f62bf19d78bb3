"""The routing rules that passes offer, and which of them need calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsify.core import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.runtime.router import Router
    from sparsify.runtime.rule import RoutingRule

COUNTING = ("top-k", "sigmoid-top-k", "group-top-k")
CUTTING = ("threshold", "top-p", "relu", "null", "dense-to-sparse")
HELP = "auto = threshold if calibrated, else top-k; the rules of sparsify.runtime.rules"


def check_rule(name: str, options: Mapping[str, Any], routed: int, *, calibrated: bool) -> None:
    """Refused where the rule cannot route ``routed`` units, or needs data that is not there."""
    if not calibrated and (name in CUTTING or name == "expert-choice"):
        raise Refused(
            f"{name} routing needs calibration data",
            suggestion="give calibration=..., or router=top-k",
        )
    if options.get("prune") and plain(name, calibrated=calibrated) != "top-k":
        raise Refused(
            "only top-k routing drops experts by their weights",
            suggestion="router=top-k, or prune=0: under the others tokens differ already",
        )
    groups = options["groups"]
    if name in ("group-top-k", "sigmoid-top-k") and routed % groups:
        fitting = [n for n in range(2, routed + 1) if routed % n == 0]
        near = min(fitting, key=lambda n: abs(n - groups), default=1)
        raise Refused(
            f"{routed} routed units do not divide into {groups} groups",
            suggestion=f"groups={near}",
        )
    if name == "sigmoid-top-k" and options["groups_kept"] > groups:
        raise Refused(
            f"{options['groups_kept']} of {groups} groups cannot be kept",
            suggestion=f"groups_kept={groups} or fewer",
        )
    if options["weights"] != "one" and name in ("auto", "top-k", "threshold"):
        raise Refused(
            f"{name} routing has unit weights only",
            suggestion="weights=one, or a rule that weighs its units (router=sigmoid-top-k)",
        )


def plain(name: str, *, calibrated: bool) -> str:
    """The rule's name: ``auto`` is decided here."""
    if name == "auto":
        return "threshold" if calibrated else "top-k"
    return name


def chosen_rule(name: str, options: Mapping[str, Any], *, calibrated: bool) -> RoutingRule:
    """The rule of these options."""
    from sparsify.runtime.rules import rule_of

    name = plain(name, calibrated=calibrated)
    if options.get("prune"):
        return rule_of("pruned-top-k", {"mu": options["prune"]})
    own: dict[str, Any] = {}
    if name in ("group-top-k", "sigmoid-top-k"):
        own["groups"] = options["groups"]
    if name == "sigmoid-top-k":
        own["groups_kept"] = options["groups_kept"]
    if name not in ("top-k", "threshold"):
        own["weights"] = options["weights"]
    return rule_of(name, own)


def protected(router: Router, x: Tensor, share: float) -> None:
    """Let the most important ``share`` of the tokens x (T, D) keep all experts, if any are dropped.

    Nothing changes under rules that drop none by their weights.
    """
    import torch

    from sparsify.runtime.rules_pruned import PrunedTopK

    if not isinstance(router.selector, PrunedTopK) or not share:
        return
    with torch.no_grad():
        level = router.scores(x).logsumexp(-1).quantile(1 - share)
    router.rule = dataclasses.replace(router.selector, important=float(level))
