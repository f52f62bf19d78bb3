"""The routing rules, one class per published system; their interface is in ``runtime.rule``.

Here are those that count, which keep the same number of units for every token: ``top-k``,
``softmax-top-k``, ``sigmoid-top-k``, ``group-top-k``, ``moh``, ``prefix``. Those that cut keep what
is above a threshold, so that tokens take as many as they need: :mod:`sparsify.runtime.rules_cut`
has ``threshold``, ``top-p``, ``relu``, ``expert-choice``, ``null``, ``dense-to-sparse``. Between
them, ``pruned-top-k`` keeps at most so many (:mod:`sparsify.runtime.rules_pruned`).
Selections and scores that nothing learns (a token's modality, expected sparsity) are in
:mod:`sparsify.runtime.unlearned`.

Any rule may see something else than the token: a router fed the conditioning of a diffusion step
(B, 1, D) gives (B, 1, N), the same units for every token of that step, so what is selected can be
fused and cached per step (MoDE, Reuss et al., arXiv:2412.12953).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput, did_you_mean
from sparsify.runtime.rule import Cut, RoutingRule, best, softmax_over
from sparsify.runtime.rules_cut import DenseToSparse, ExpertChoice, Null, Relu, Threshold, TopP
from sparsify.runtime.rules_pruned import PrunedTopK


@dataclasses.dataclass(frozen=True)
class TopK(RoutingRule):
    """The k highest scores. Dial: k."""

    name: ClassVar[str] = "top-k"
    ways: ClassVar[tuple[str, ...]] = ("one",)


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK(RoutingRule):
    """The k highest, weighted by softmax (Shazeer et al., arXiv:1701.06538; Mixtral, 2401.04088).

    Dial: k. Weights (``paper``): softmax over the kept units, which sum to one; with
    ``renormalise=False`` over all of them, so that they sum to the kept mass (Switch, 2101.03961).
    """

    weights: str = "paper"
    renormalise: bool = True

    name: ClassVar[str] = "softmax-top-k"
    paper: ClassVar[str] = "arXiv:1701.06538"

    def check(self, shared: int, routed: int) -> None:
        if shared and self.weights == "paper":
            raise BadInput(
                "softmax-top-k routing cannot have shared units",
                why="its weights sum to one over the routed units alone",
            )

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        if self.renormalise:
            return softmax_over(scores, live)
        return torch.where(live, torch.softmax(scores, dim=-1), 0.0)


@dataclasses.dataclass(frozen=True)
class SigmoidTopK(RoutingRule):
    """Sigmoid scores, balanced by biases, limited to groups (DeepSeek-V3, arXiv:2412.19437).

    The k highest ``sigmoid(s) + b`` are kept; weights (``paper``) are ``sigmoid(s)`` over its sum
    over the kept units. The correction b has no gradient: after a step
    ``b += rate * sign(mean load - load)`` (:func:`sparsify.runtime.losses.correct`,
    arXiv:2408.15664). With ``groups``, a group (a node) is scored by the sum of its two best keys,
    and units come from the best ``groups_kept`` groups only. Dial: k; where k needs more groups,
    more are kept, so at the dense limit all are.
    """

    groups: int = 1
    groups_kept: int = 1

    name: ClassVar[str] = "sigmoid-top-k"
    paper: ClassVar[str] = "arXiv:2412.19437"
    corrects: ClassVar[bool] = True

    def check(self, shared: int, routed: int) -> None:
        _divides(self, routed, self.groups)
        if not 1 <= self.groups_kept <= self.groups:
            raise BadInput(f"{self.groups_kept} of {self.groups} groups cannot be kept")

    def keys(self, scores: Tensor, correction: Tensor | None = None) -> Tensor:
        keys = torch.sigmoid(scores)
        return keys if correction is None else keys + correction.to(keys.dtype)

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        count, routed = int(cut.keep), keys.shape[-1]
        if self.groups > 1:
            size = routed // self.groups
            grouped = keys.unflatten(-1, (self.groups, size))
            score = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1)
            kept = best(score, max(self.groups_kept, math.ceil(count / size)))
            keys = grouped.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(-2)
        return best(keys, count)

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        kept = torch.sigmoid(scores) * live
        return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class GroupTopK(RoutingRule):
    """Exactly k / G units from each of G equal groups (MoGE: Pangu Pro MoE, arXiv:2505.21411).

    Groups are runs of neighbouring units (one device's); the load of groups is equal by
    construction. Dial: k, a multiple of G. Weights (``paper``): softmax over the kept units.
    """

    groups: int = 2

    name: ClassVar[str] = "group-top-k"
    paper: ClassVar[str] = "arXiv:2505.21411"

    @property
    def step(self) -> int:
        return self.groups

    def check(self, shared: int, routed: int) -> None:
        _divides(self, routed, self.groups)

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        grouped = keys.unflatten(-1, (self.groups, -1))
        return best(grouped, int(cut.keep) // self.groups).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Moh(RoutingRule):
    """Two-stage router of Mixture-of-Head attention (MoH, Jin et al., arXiv:2410.11842).

    Shared heads are weighted by ``b1 * softmax(W_s x)``, the k best routed ones by
    ``b2 * softmax(W_r x)``, with ``(b1, b2) = softmax(W_h x)``. The router computes the S + 2
    further scores ``[W_s x, W_h x]``; without shared heads there is one stage and no betas.
    Dial: k. Weights: ``scaled`` (default) as in the paper's code: times S, times the number of live
    heads (softmax over those) and times 2, so that with zero ``W_s`` and ``W_h``, where a
    conversion starts, shared heads weigh one; ``mix`` then does it for the routed ones. Dense
    limit: at the start; training leaves it.
    """

    weights: str = "scaled"

    name: ClassVar[str] = "moh"
    paper: ClassVar[str] = "arXiv:2410.11842"

    def extra(self, shared: int) -> int:
        return 0 if self.weights == "one" or not shared else shared + 2

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        if self.weights == "paper":
            return torch.where(live, torch.softmax(scores, dim=-1), 0.0)
        return softmax_over(scores, live)

    def of_shared(self, cut: Cut, shared: int) -> tuple[Tensor, Tensor] | None:
        if cut.extra is None:
            return None
        first = torch.softmax(cut.extra[..., :shared], dim=-1)
        betas = torch.softmax(cut.extra[..., shared:], dim=-1)
        if self.weights == "scaled":
            first, betas = first * shared, betas * 2
        return first * betas[..., :1], betas[..., 1:]


@dataclasses.dataclass(frozen=True)
class Prefix(RoutingRule):
    """The first k of a fixed order, whatever the scores. Dial: k."""

    name: ClassVar[str] = "prefix"
    spreads: ClassVar[bool] = True
    ways: ClassVar[tuple[str, ...]] = ("one",)

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        first = torch.arange(keys.shape[-1], device=keys.device) < cut.keep
        return first.expand(keys.shape)


# ---------------------------------------------------------------------------- the table

RULES: dict[str, type[RoutingRule]] = {
    rule.name: rule
    for rule in (
        TopK, SoftmaxTopK, SigmoidTopK, GroupTopK, Moh, Prefix, PrunedTopK,
        Threshold, TopP, Relu, ExpertChoice, Null, DenseToSparse,
    )
}  # fmt: skip


def rule_of(rule: str | RoutingRule, options: dict[str, Any] | None = None) -> RoutingRule:
    """The rule called ``rule``; BadInput where there is none, or it has no such options."""
    if isinstance(rule, RoutingRule):
        return rule
    if rule not in RULES:
        near = did_you_mean(rule, RULES) if isinstance(rule, str) else None
        raise BadInput(
            f"no routing rule '{rule}'", help=near or f"one of: {', '.join(sorted(RULES))}"
        )
    try:
        return RULES[rule](**(options or {}))
    except TypeError as error:
        raise BadInput(f"{rule} routing cannot take these options", why=str(error)) from None


def _divides(rule: RoutingRule, routed: int, groups: int) -> None:
    if groups < 1 or routed % groups:
        raise BadInput(
            f"{routed} routed units do not divide into {groups} groups",
            help=f"one of: {', '.join(str(n) for n in range(1, routed + 1) if routed % n == 0)}",
        )
