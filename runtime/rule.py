"""One interface for all routers: scores -> :class:`Selection`.

A :class:`RoutingRule` says which units a token uses and with what weight. It is frozen data (its
fields are its JSON options), so that a router keeps its rule's name and options in the checkpoint;
what is learnt or adapts (score weights, correction biases, tables) lives in the router. The rules
are in :mod:`sparsify.runtime.rules`, one class per published system.

The dial. ``active`` becomes ``keep``, the routed units that a token uses. Rules that count keep
exactly that many for every token; rules that cut (``mean``) keep those whose key is above a
threshold, so that the budget holds on average. At ``keep`` = all units everything is live under
every rule, whatever the scores: that is the dense limit.

The weights. ``one``: exactly one for every live unit, so the dense limit is the dense model; the
gradient reaches the scores straight-through, as if the weight were ``1 + sigmoid(s)`` minus its own
value (Bengio et al., arXiv:1308.3432). ``paper``: what the paper multiplies by; the gradient is
exact, but weights that sum to one are the dense model only where the units are copies of one layer.
``scaled``: the paper's weights scaled to a mean of one over the live units and blended in by a
trainable ``mix``, ``1 + mix * (n * w / sum(w) - 1)``. ``mix`` starts at zero (as ReZero,
arXiv:2003.04887), where every weight is exactly one and the dense limit holds; at one the weights
are the paper's times a constant per token. Its gradient is exact, with the straight-through term
beside it, since at zero the scores would get none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput

WAYS = ("one", "scaled", "paper")


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """What a router decides.

    Attributes:
        mask: (..., R) bool, the live routed units.
        weights: (..., R), 0 where dead.
        shared: (..., S) weights of the shared units, or None where they are one.
        aux: what losses need beside scores and weights, by name.
    """

    mask: Tensor
    weights: Tensor
    shared: Tensor | None = None
    aux: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def ids(self) -> tuple[Tensor, Tensor]:
        """(ids, weights), each (..., K), K the most that any token uses: live units in order.

        Tokens that use fewer are filled up with id R and weight 0.
        """
        units = self.mask.shape[-1]
        most = int(self.mask.sum(-1).max()) if self.mask.numel() else 0
        numbers = torch.arange(units, device=self.mask.device).expand(self.mask.shape)
        ids = numbers.masked_fill(~self.mask, units).sort(dim=-1).values[..., :most]
        padded = torch.nn.functional.pad(self.weights, (0, 1))
        return ids, padded.gather(-1, ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Where a rule cuts.

    Attributes:
        keep: routed units that a token uses (on average, for rules that cut).
        threshold: keys above it are live, for rules that cut: one, or (R,) one per unit.
        training: whether the module trains: noise, and choices that look at later tokens.
        extra: (..., E) the rule's further scores, or None.
    """

    keep: float
    threshold: float | Tensor = math.inf
    training: bool = False
    extra: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class RoutingRule:
    """How units are selected from scores; see the module's docstring.

    Attributes:
        name: in specs and options. paper: its source. mean: the budget holds on average. table:
            budgets below one need calibrated keys. per_unit: with a threshold for every unit.
            spreads: a budget for several layers may follow their error tables. corrects: keys are
            shifted by the router's correction biases. ways: the weights it has.
    """

    weights: str = "one"

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    mean: ClassVar[bool] = False
    table: ClassVar[bool] = False
    per_unit: ClassVar[bool] = False
    spreads: ClassVar[bool] = False
    corrects: ClassVar[bool] = False
    ways: ClassVar[tuple[str, ...]] = WAYS

    def __post_init__(self) -> None:
        if self.weights not in self.ways:
            raise BadInput(
                f"{self.name} routing has no weights '{self.weights}'",
                help=f"one of: {', '.join(self.ways)}",
            )

    # -- sizes

    @property
    def step(self) -> int:
        """The number of routed units that a token keeps is a multiple of this."""
        return 1

    def check(self, shared: int, routed: int) -> None:
        """BadInput where the rule cannot route that many units."""

    def extra(self, shared: int) -> int:
        """E: scores the router computes beside those of its routed units."""
        return 0

    def whole(self, wanted: float, least: float) -> float:
        """``wanted`` rounded to what the rule can keep; at least ``least``."""
        if self.mean:
            return wanted
        rounded = self.step * math.floor(wanted / self.step + 0.5)
        return max(rounded, self.step if least else 0)

    # -- what a rule defines

    def perturbed(self, scores: Tensor, training: bool) -> Tensor:
        """The scores with the rule's noise, in training."""
        return scores

    def keys(self, scores: Tensor, correction: Tensor | None = None) -> Tensor:
        """(..., R) -> (..., R): what is ranked, or compared with a threshold."""
        return scores

    def default_cut(self, share: float) -> float:
        """The threshold that keeps ``share`` of the units where no table was calibrated."""
        return math.inf

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        """(..., R) bool. Ties go to the lower unit."""
        return keys > cut.threshold if self.mean else best(keys, int(cut.keep))

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        """(..., R): the paper's weights, 0 where dead."""
        return softmax_over(scores, live)

    def of_shared(self, cut: Cut, shared: int) -> tuple[Tensor, Tensor] | None:
        """Weights (..., S) of the shared units and a factor (..., 1) of the routed ones."""
        return None

    def aux(self, keys: Tensor, live: Tensor, cut: Cut) -> dict[str, Tensor]:
        """What losses need."""
        return {}

    # -- JSON

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in fields}
        return {name: value for name, value in values.items() if value != fields[name]}

    def __str__(self) -> str:
        inside = " ".join(f"{k}={v}" for k, v in self.options().items())
        return f"{self.name}{{{inside}}}" if inside else self.name


def mask_of(
    rule: RoutingRule, scores: Tensor, cut: Cut, correction: Tensor | None = None
) -> Tensor:
    """scores (..., R) -> bool (..., R): the live units."""
    if cut.keep >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return rule.live(rule.keys(scores, correction), cut)


def select(
    rule: RoutingRule,
    scores: Tensor,
    cut: Cut,
    live: Tensor | None = None,
    *,
    shared: int = 0,
    correction: Tensor | None = None,
    mix: Tensor | float = 1.0,
) -> Selection:
    """Route.

    Args:
        scores: (..., R) of the routed units.
        live: (..., R) bool, the live units where they are known, the rule's noise in the scores.
        shared: units that are always live, for rules that weigh them.
        correction: (R,) added to the keys, for rules that balance so.
        mix: how far the weights ``scaled`` are the paper's.
    """
    if live is None:
        scores = rule.perturbed(scores, cut.training)
        live = mask_of(rule, scores, cut, correction)
    both = None if rule.weights == "one" else rule.of_shared(cut, shared)
    if rule.weights == "paper":
        weights = rule.shares(scores, live, cut)
    else:
        weights = live.to(scores.dtype)
        if rule.weights == "scaled":
            share = rule.shares(scores, live, cut)
            total = share.sum(-1, keepdim=True)
            tiny = torch.finfo(share.dtype).tiny
            even = live.sum(-1, keepdim=True) * share / total.clamp_min(tiny)
            weights = torch.where(live & (total > tiny), 1 + mix * (even - 1), weights)
        if scores.requires_grad:
            s = torch.sigmoid(scores).nan_to_num()
            weights = torch.where(live, weights + (s - s.detach()), 0.0)
    extra = {} if cut.extra is None else {"extra": cut.extra}
    aux = {**extra, **rule.aux(rule.keys(scores, correction), live, cut)} if extra else {}
    if both is None:
        return Selection(live, weights, None, aux)
    return Selection(live, weights * both[1], both[0], aux)


# ---------------------------------------------------------------------------- shared by rules


def best(keys: Tensor, count: int) -> Tensor:
    """(..., R) -> bool: the ``count`` largest; ties go to the lower unit."""
    # torch.topk breaks ties as it likes; a stable sort makes the choice reproducible.
    found = keys.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(keys, dtype=torch.bool).scatter(-1, found, True)


def softmax_over(scores: Tensor, live: Tensor) -> Tensor:
    """Softmax over the live units, zero elsewhere; all zero where none is live."""
    kept = scores.masked_fill(~live, torch.finfo(scores.dtype).min)
    return torch.where(live, torch.softmax(kept, dim=-1), 0.0)
