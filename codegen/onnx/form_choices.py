"""Forms of depth routers whose choice is read off tables or looks at the whole sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.codegen.onnx.forms import form
from sparsify.runtime.depth import DepthRouter
from sparsify.runtime.recursion import DepthChoice, RecursionRouter


class _BestTokens(DepthRouter):
    """``top-k`` among the tokens of a sequence: a rank below a count, since ``T`` is not known."""

    def live(self, scores: Tensor, extra: Tensor | None = None) -> Tensor:
        if self.budget >= 1 or self.rule != "top-k":
            return super().live(scores, extra)
        tokens = torch.ones_like(scores[:1]).sum(1, dtype=torch.float64)  # (1, 1)
        kept = (self.budget * tokens + 0.5).floor()
        order = scores.sort(dim=1, descending=True, stable=True).indices
        rank = order.sort(dim=1, stable=True).indices
        return rank < kept


@form(DepthRouter)
class DepthRouterForm(_BestTokens):
    """See :class:`_BestTokens`."""


@form(RecursionRouter)
class RecursionRouterForm(_BestTokens, RecursionRouter):
    """See :class:`_BestTokens`."""


@form(DepthChoice)
class DepthChoiceForm(DepthChoice):
    """Its thresholds as they are at the present budget."""

    def prepare(self) -> None:
        limits = [min(max(t, -3e38), 3e38) if math.isinf(t) else t for t in self.thresholds()]
        self.register_buffer("limits", torch.tensor(limits, dtype=self.weight.dtype))

    limits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> select (B, T, steps - 1), 0 where dead; live steps come first."""
        return self.live(self.scores(x)).to(x.dtype)

    def live(self, scores: Tensor, extra: Tensor | None = None) -> Tensor:
        """scores (B, T, 1) -> bool (B, T, steps - 1)."""
        return scores > self.limits.to(scores.dtype)
