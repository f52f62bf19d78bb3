"""A router that reads its scores off the experts' weights: expected activation sparsity.

MoE-X (Yang et al., arXiv:2503.07639): weights into an expert's neurons are taken as Gaussian with
the mean and the variance that they have over the neurons, so a pre-activation is Gaussian given x,
and the fraction of neurons where it is positive is known in closed form
(:func:`sparsify.runtime.unlearned.expected_active`). The sparsest experts score highest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.router import Router, as_parameter
from sparsify.runtime.spec import routed
from sparsify.runtime.unlearned import expected_active

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class SparsityRouter(Router):
    """A :class:`Router` that scores the activation sparsity that each expert is expected to have.

    Args:
        weight: (R, D) mean of the weights into an expert's neurons; bias: (R,) of their biases.
        spread: (R, D) standard deviation of those weights; bias_spread: (R,) of the biases. None =
            zeros.
        prefer: ``sparse``: the score is minus the expected fraction of active neurons (the paper);
            ``active``: plus that fraction.
        options: of :class:`Router`.

    All four start from the experts' weights and then train on their own; :meth:`refit` takes them
    from the weights again.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        spread: Tensor | None = None,
        bias_spread: Tensor | None = None,
        prefer: str = "sparse",
        **options: Any,
    ) -> None:
        super().__init__(weight, bias, **options)
        if prefer not in ("sparse", "active"):
            raise BadInput(f"a router cannot prefer {prefer!r} experts", help="sparse or active")
        spread = torch.zeros_like(self.weight) if spread is None else spread
        bias_spread = torch.zeros_like(self.bias) if bias_spread is None else bias_spread
        if spread.shape != self.weight.shape or bias_spread.shape != self.bias.shape:
            raise BadInput(
                f"spreads {tuple(spread.shape)} and {tuple(bias_spread.shape)} for means"
                f" {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )
        trains = self.weight.requires_grad
        self.spread = as_parameter(spread, trains)
        self.bias_spread = as_parameter(bias_spread, trains)
        self.prefer = prefer

    @classmethod
    def from_experts(cls, rows: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """From the weights (R, m, D) and biases (R, m) that the activation sees."""
        mean, bias, spread, bias_spread = _moments(rows, bias)
        return cls(mean, bias, spread=spread, bias_spread=bias_spread, **options)

    @torch.no_grad()
    def refit(self, rows: Tensor, bias: Tensor | None = None) -> None:
        """Take means and spreads from (trained) experts: (R, m, D) and (R, m).

        A calibrated threshold stays where it was: :meth:`calibrate` again.
        """
        mine = (self.weight, self.bias, self.spread, self.bias_spread)
        for parameter, found in zip(mine, _moments(rows, bias), strict=True):
            parameter.copy_(found)

    def scores(self, x: Tensor) -> Tensor:
        """(..., R) in [-1, 0] (``sparse``) or [0, 1] (``active``), in float32 or wider."""
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        means, spreads = (self.weight.to(wide), self.bias.to(wide)), (self.spread, self.bias_spread)
        active = expected_active(x.to(wide), *means, *(s.to(wide).square() for s in spreads))
        return self._steered(-active if self.prefer == "sparse" else active)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "prefer": self.prefer}

    @classmethod
    def arguments(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().arguments(options), "prefer": options["prefer"]}

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        base = super().cost(active)
        if not base.flops:  # nothing is scored
            return base
        weights = self.spread.numel()
        return base + Cost(2 * weights, (weights + self.routed) * self.spread.element_size())


def _moments(rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and standard deviations over an expert's neurons: (R, D), (R,), (R, D), (R,)."""
    if bias is None:
        bias = rows.new_zeros(rows.shape[:2])
    rows, bias = rows.detach(), bias.detach()
    spread, bias_spread = (t.std(1, correction=0) for t in (rows, bias))
    return rows.mean(1), bias.mean(1), spread, bias_spread
