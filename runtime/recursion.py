"""Routers of recursion depth: who goes on to the next step of a recursed stack.

Mixture-of-Recursions (Bae et al., arXiv:2507.10524): every token runs the first step; step r of R
then runs the fraction ``((R - r + 1) / R)^p`` of all tokens. The dial is the mean of these
fractions over the routed steps 2 .. R: at one half, p = 1 and they are the paper's (2/3 and 1/3 for
R = 3). A token that left does not come back.

:class:`RecursionRouter` decides anew before every step (the paper's expert choice: top-k among the
tokens that are still there; or a threshold, which looks at no other token). :class:`DepthChoice`
gives every token its depth once (token choice), by one score and a threshold for every step; the
paper's R-way softmax with a balancing loss needs training, where one score can be fitted.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.budget import quantile
from sparsify.runtime.depth import DepthRouter, straight_through
from sparsify.runtime.spec import routed


@functools.lru_cache(maxsize=1024)
def step_shares(steps: int, active: float) -> tuple[float, ...]:
    """Fractions of tokens that run the steps 2 .. R, descending, their mean ``active``."""
    ratios = [(steps - r) / steps for r in range(1, steps)]
    if active >= 1:
        return (1.0,) * (steps - 1)
    low, high = -60.0, 60.0  # log2 of the exponent p: shares fall as it grows
    for _ in range(200):
        middle = (low + high) / 2
        mean = sum(ratio ** (2.0**middle) for ratio in ratios) / len(ratios)
        low, high = (middle, high) if mean > active else (low, middle)
    return tuple(ratio ** (2.0**low) for ratio in ratios)


@routed
class RecursionRouter(DepthRouter):
    """Which tokens run step ``step`` of ``steps``, among those that ran the one before.

    Args:
        weight, bias, options: see :class:`DepthRouter`.
        step: 2 .. steps.
    """

    own: ClassVar[tuple[str, ...]] = ("step", "steps")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        step: int,
        steps: int,
        **options: Any,
    ) -> None:
        if not 2 <= step <= steps:
            raise BadInput(f"step {step} of {steps} is none that a router opens")
        self.__dict__["step"], self.__dict__["steps"] = step, steps
        super().__init__(weight, bias, **options)

    step: int
    steps: int

    def wanted(self, active: float) -> float:
        """The share of all tokens that run this step."""
        return step_shares(self.steps, min(max(active, 0.0), 1.0))[self.step - 2]

    def live_share(self, unit: int | None = None) -> float:
        return self.budget

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """x (B, T, D), before (B, T, 1) of the step before -> select (B, T, 1), 0 where dead."""
        if self.all_live and not self.follows(x) and before is None:
            return x.new_ones((*x.shape[:-1], 1))
        scores = self.scores(x)
        live = self.live(self.among(scores, before))
        if before is not None:
            live = live & (before != 0)
        return straight_through(scores, live, x.dtype)

    def among(self, scores: Tensor, before: Tensor | None) -> Tensor:
        """Scores with those of tokens that left below all others."""
        if before is None:
            return scores
        return torch.where(before != 0, scores, scores.min().detach() - 1)

    def extra_repr(self) -> str:
        return f"step {self.step} of {self.steps}, {super().extra_repr()}"


@routed
class DepthChoice(DepthRouter):
    """How many of ``steps`` a token runs, decided once by one score.

    Args:
        weight, bias, options: see :class:`DepthRouter`; the rule is ``threshold``.
    """

    own: ClassVar[tuple[str, ...]] = ("steps",)

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, steps: int, **options: Any
    ) -> None:
        if steps < 2:
            raise BadInput(f"{steps} step leaves nothing to choose")
        self.__dict__["steps"] = steps
        super().__init__(weight, bias, **{**options, "rule": "threshold"})

    steps: int

    def live_share(self, unit: int | None = None) -> float:
        return self.active if unit is None else step_shares(self.steps, self.active)[unit]

    def thresholds(self) -> list[float]:
        """Scores above these run step 2, 3, ..., R."""
        shares = step_shares(self.steps, self.active)
        if self.quantiles is None or self.active >= 1:
            return [-math.inf] * len(shares)
        moved = self._shift() + self.drift
        return [quantile(self.quantiles, 1 - share) + moved for share in shares]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> select (B, T, steps - 1), 0 where dead; live steps come first."""
        if self.all_live and not self.follows(x):
            return x.new_ones((*x.shape[:-1], self.steps - 1))
        scores = self.scores(x)
        live = scores > scores.new_tensor(self.thresholds())
        return straight_through(scores, live, x.dtype)

    def extra_repr(self) -> str:
        return f"{self.steps} steps, {super().extra_repr()}"
