"""Inside experts: which neurons of a token's live experts pass their value on.

Rows of the packed down projection are neurons, so a neuron that is dead for a token is a run of
memory that is not read. Dead experts compute no neurons: budgets are shares of the live experts'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsify.runtime.inputs import Magnitude
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class LiveNeurons(Magnitude):
    """A :class:`Magnitude` over the neurons of N experts of m neurons, in packed order.

    Under ``top-k`` every live expert keeps the same number of neurons; else one threshold cuts.

    Args:
        scale, centre, options: as of Magnitude, (N*m,).
        experts: N.
        means: (N, D) what an expert gives when all its neurons are dead, ``centre @ down``; None
            where dead neurons count as zero.
    """

    counts: ClassVar[bool] = True

    def __init__(
        self,
        scale: Tensor,
        centre: Tensor | None = None,
        *,
        experts: int,
        means: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(scale, centre, **options)
        self.experts = experts
        self.means = None if means is None else as_parameter(means)

    @classmethod
    def of(cls, select: Magnitude, down: Tensor, order: Tensor | None) -> Self:
        """From a selection over neurons in dense order, for down (N, m, D) packed by ``order``."""
        experts, size, _ = down.shape
        at = torch.arange(experts * size) if order is None else order
        centre, means = select.centre, None
        if centre is not None:
            centre = centre[at]
            means = torch.einsum("nm,nmd->nd", centre.view(experts, size).to(down), down.detach())
            means.requires_grad_(down.requires_grad)
        return cls(
            select.scale[at], centre, experts=experts, means=means, rule=select.selector,
            quantiles=select.quantiles, errors=select.errors, unit_cost=select.unit_cost,
        )  # fmt: skip

    def parts(self, experts: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Scale and centre (k, m) of these experts."""
        centre = None if self.centre is None else self.centre.view(self.experts, -1)[experts]
        return self.scale.view(self.experts, -1)[experts], centre

    def forward(self, hidden: Tensor, experts: Tensor | slice) -> Tensor:
        """hidden (..., k, m) of k experts -> less their centre, dead neurons zero."""
        scale, centre = self.parts(experts)
        values = hidden if centre is None else hidden - centre
        scores = values.detach().float().abs() * scale
        if self.selector.mean:
            live = scores > self.threshold
        else:
            kept = max(math.floor(self.active * scores.shape[-1] + 0.5), 1)
            best = scores.topk(kept, dim=-1).indices
            live = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        self.counter.seen(1, live.numel(), int(live.sum()))
        return values.masked_fill(~live, 0.0)

    def options(self) -> dict[str, Any]:
        means = self.means
        shape = None if means is None else [means.shape[1], dtype_name(means.dtype)]
        return {**super().options(), "experts": self.experts, "means": shape}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        size, centre, means = options["features"], options["centre"], options["means"]
        experts = options["experts"]
        if means is not None:
            means = torch.empty(experts, means[0], dtype=dtype_of(means[1]))
        return cls(
            torch.empty(size),
            None if centre is None else torch.empty(size, dtype=dtype_of(centre)),
            experts=experts,
            means=means,
            **cls.budget_arguments(options),
        ).restore(options)
