"""Top-k routing that drops weak experts of unimportant tokens.

A rule of its own beside :mod:`sparsify.runtime.rules`, where its plain form is; kernels do not know
it, so it is selected by PyTorch before they run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.rule import Cut, RoutingRule, best


@dataclasses.dataclass(frozen=True)
class PrunedTopK(RoutingRule):
    """The k highest, without those far below the first (MC-MoE, arXiv:2410.06270).

    A unit is dropped where its softmax weight is below ``mu`` times the first one's. Tokens from
    the level ``important`` on keep all k. Importance is the logarithm of the sum of ``exp(s)``: the
    energy that the units are predicted to add, where scores are log energies. The paper's (the
    token's norm times the attention that it gets from later ones) is not known where a token is
    routed by itself. Dial: k, so the budget is the most that a token uses, not the mean.
    """

    mu: float = 0.5
    important: float = math.inf

    name: ClassVar[str] = "pruned-top-k"
    paper: ClassVar[str] = "arXiv:2410.06270"
    ways: ClassVar[tuple[str, ...]] = ("one",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < 1:
            raise BadInput(f"mu={self.mu:g}", help="a share of the first weight: 0 to below 1")

    def live(self, keys: Tensor, cut: Cut) -> Tensor:
        kept = best(keys, int(cut.keep))
        least = math.log(self.mu) if self.mu else -math.inf
        strong = keys - keys.amax(-1, keepdim=True) >= least
        important = keys.logsumexp(-1, keepdim=True) >= self.important
        return kept & (strong | important)
