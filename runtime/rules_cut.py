"""Routing rules that cut: what is above a threshold is live, tokens take as many as they need.

The budget holds on average: the threshold is read off the keys of calibration tokens, or is the
paper's own where no table was calibrated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.rule import Cut, RoutingRule, best


@dataclasses.dataclass(frozen=True)
class Threshold(RoutingRule):
    """All whose score is above one value, read off the scores of calibration tokens.

    Dial: the value at which the mean number of live units is the budget. In the manner of TEAL
    (arXiv:2408.14690), for units instead of inputs.
    """

    name: ClassVar[str] = "threshold"
    mean: ClassVar[bool] = True
    table: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    ways: ClassVar[tuple[str, ...]] = ("one",)


@dataclasses.dataclass(frozen=True)
class TopP(RoutingRule):
    """The smallest set whose probability reaches p (Huang et al., arXiv:2403.07652).

    A unit's key is one minus the mass of the units ranked before it, so the set is what has keys
    above ``1 - p``. Dial: with calibrated keys, the p at which the mean number of live units is the
    budget; without, ``active`` is the mass p itself. The first unit is always live. Weights
    (``paper``): the probabilities, which sum to at least p.
    """

    name: ClassVar[str] = "top-p"
    paper: ClassVar[str] = "arXiv:2403.07652"
    mean: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def keys(self, scores: Tensor, correction: Tensor | None = None) -> Tensor:
        p, order = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True, stable=True)
        before = (p.cumsum(-1) - p).clamp_min(0)
        return torch.zeros_like(p).scatter(-1, order, 1 - before)

    def default_cut(self, share: float) -> float:
        return 1 - share

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        return ((keys > cut.threshold) | (keys >= 1)) & (cut.keep > 0)

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        return torch.where(live, torch.softmax(scores, dim=-1), 0.0)


@dataclasses.dataclass(frozen=True)
class Relu(RoutingRule):
    """Live where the score is positive, weight ``relu(s)`` (ReMoE, arXiv:2412.14711).

    Also PVChat's ReLU mixture of heads (arXiv:2503.17069). Fully differentiable with weights
    ``paper``. Dial: the target of the sparsity losses (:mod:`sparsify.runtime.sparsity_losses`);
    with calibrated keys also the zero point, which moves to where the mean number of live units is
    the budget. Weights (``scaled``): ``relu(s - zero point)``, whose ratio to its mean goes to one
    as the zero point goes down, so they are continuous at the dense limit.
    """

    name: ClassVar[str] = "relu"
    paper: ClassVar[str] = "arXiv:2412.14711"
    mean: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def default_cut(self, share: float) -> float:
        return 0.0

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        if cut.keep >= scores.shape[-1]:  # the zero point is at minus infinity
            return torch.relu(scores) if self.weights == "paper" else live.to(scores.dtype)
        return torch.relu(scores - cut.threshold) * live


@dataclasses.dataclass(frozen=True)
class ExpertChoice(RoutingRule):
    """Every unit takes its C best tokens (Zhou et al., arXiv:2202.09368). Dial: C = T * share.

    The choice looks at later tokens, so it is made in training only, among the tokens of one
    sequence (dimension -2). In evaluation a token is judged by itself, right under generation:
    with ``decode="table"`` by a threshold per unit that its calibration tokens would give the same
    capacity; with ``decode="zero"`` where the score is positive, which the choice has to be trained
    for (:func:`sparsify.runtime.losses.choice_loss`, the auxiliary loss of Mixture-of-Depths,
    arXiv:2404.02258, and Mixture-of-Recursions, arXiv:2507.10524). Weights (``paper``): softmax
    over the units, not renormalised.
    """

    decode: str = "table"

    name: ClassVar[str] = "expert-choice"
    paper: ClassVar[str] = "arXiv:2202.09368"
    mean: ClassVar[bool] = True
    per_unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode not in ("table", "zero"):
            raise BadInput(f"expert choice cannot decode by '{self.decode}'", help="table or zero")

    @property
    def table(self) -> bool:  # type: ignore[override]
        """Whether budgets need calibrated keys."""
        return self.decode == "table"

    def default_cut(self, share: float) -> float:
        return 0.0

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        if not cut.training or keys.dim() < 2:
            return keys > (0.0 if self.decode == "zero" else cut.threshold)
        tokens, units = keys.shape[-2:]
        capacity = max(math.floor(tokens * cut.keep / units + 0.5), 1 if cut.keep else 0)
        return best(keys.transpose(-1, -2), capacity).transpose(-1, -2)

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        return torch.where(live, torch.softmax(scores, dim=-1), 0.0)


@dataclasses.dataclass(frozen=True)
class Null(RoutingRule):
    """Top-k among the units and m nulls that compute nothing (AdaMoE, arXiv:2406.13233).

    Tokens use 0 to k true units; a null-aware load loss keeps the mean
    (:func:`sparsify.runtime.losses.null_balance_loss`). Dial: k = budget * (R + m) / R, the mean
    under balanced loads. The router scores the nulls with m further scores; with calibrated keys
    these sit at the score that the budgeted number of units exceeds. Weights (``paper``): softmax
    over the true units among the k.
    """

    nulls: int = 4

    name: ClassVar[str] = "null"
    paper: ClassVar[str] = "arXiv:2406.13233"
    mean: ClassVar[bool] = True

    def check(self, shared: int, routed: int) -> None:
        if self.nulls < 1:
            raise BadInput(f"{self.nulls} null units: at least one")

    def extra(self, shared: int) -> int:
        return self.nulls

    def chosen(self, routed: int, keep: float) -> int:
        """k, of R + m."""
        total = routed + self.nulls
        return min(max(math.floor(keep * total / routed + 0.5), 1 if keep else 0), total)

    def _all(self, keys: Tensor, cut: Cut) -> Tensor:
        """(..., R + m) bool: the k best; a null loses a tie with a unit."""
        shape = (*keys.shape[:-1], self.nulls)
        nulls = keys.new_zeros(shape) if cut.extra is None else cut.extra.to(keys.dtype)
        level = cut.threshold
        if isinstance(level, float) and math.isfinite(level):
            nulls = nulls + level
        both = torch.cat([keys, nulls.expand(shape)], dim=-1)
        return best(both, self.chosen(keys.shape[-1], cut.keep))

    def default_cut(self, share: float) -> float:
        return 0.0

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        return self._all(keys, cut)[..., : keys.shape[-1]]

    def aux(self, keys: Tensor, live: Tensor, cut: Cut) -> dict[str, Tensor]:
        return {"null": self._all(keys, cut)[..., keys.shape[-1] :]}


@dataclasses.dataclass(frozen=True)
class DenseToSparse(RoutingRule):
    """Gumbel-softmax gates that sharpen; those under a floor are skipped (EvoMoE, 2112.14397).

    Gates are ``softmax((log p + gumbel noise) / temperature)``, without the noise in evaluation;
    :func:`annealed` gives the temperature of a training step. Dial: with calibrated keys, the floor
    at which the mean number of live units is the budget (calibrate again when the temperature has
    moved); without, the paper's ``floor``, and the temperature alone decides how many are above it.
    Weights (``paper``): the gates, not renormalised.
    """

    temperature: float = 1.0
    floor: float = 0.02  # the authors' code

    name: ClassVar[str] = "dense-to-sparse"
    paper: ClassVar[str] = "arXiv:2112.14397"
    mean: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def check(self, shared: int, routed: int) -> None:
        if not self.temperature > 0:
            raise BadInput(f"a temperature of {self.temperature:g}", help="above zero")

    def perturbed(self, scores: Tensor, training: bool) -> Tensor:
        if not training:
            return scores
        noise = -torch.empty_like(scores).exponential_().clamp_min(1e-30).log()
        return torch.log_softmax(scores, dim=-1) + noise

    def keys(self, scores: Tensor, correction: Tensor | None = None) -> Tensor:
        return torch.softmax(scores / self.temperature, dim=-1)

    def default_cut(self, share: float) -> float:
        return self.floor

    def shares(self, scores: Tensor, live: Tensor, cut: Cut) -> Tensor:
        return torch.where(live, self.keys(scores), 0.0)


def annealed(
    progress: float, *, start: float = 2.0, end: float = 0.3, how: str = "cosine"
) -> float:
    """The temperature of a dense-to-sparse gate after the fraction ``progress`` of training.

    ``cosine`` as in the authors' code, ``exponential`` or ``linear``; from ``start`` to ``end``.
    """
    at = min(max(progress, 0.0), 1.0)
    if how == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * at)) / 2
    if how == "exponential":
        return float(start * (end / start) ** at)
    if how == "linear":
        return start + (end - start) * at
    raise BadInput(f"no annealing '{how}'", help="cosine, exponential or linear")
