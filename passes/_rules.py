"""The routing rules that passes offer, and which of them need calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsify.core import Refused

if TYPE_CHECKING:
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


def chosen_rule(name: str, options: Mapping[str, Any], *, calibrated: bool) -> RoutingRule:
    """The rule of these options: ``auto`` is decided here."""
    from sparsify.runtime.rules import rule_of

    if name == "auto":
        name = "threshold" if calibrated else "top-k"
    own: dict[str, Any] = {}
    if name in ("group-top-k", "sigmoid-top-k"):
        own["groups"] = options["groups"]
    if name == "sigmoid-top-k":
        own["groups_kept"] = options["groups_kept"]
    if name not in ("top-k", "threshold"):
        own["weights"] = options["weights"]
    return rule_of(name, own)
