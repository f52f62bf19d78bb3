"""Experts in a latent space: one projection into it and one out of it, shared by all of them.

Mixture of Latent Experts (Liu et al., arXiv:2503.23100): an expert's weights are products of a
factor of its own and a base that experts share. The bases are applied once per token, before and
after the experts, which are then a routed layer of the latent's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self

linear = torch.nn.functional.linear


@routed
class LatentFFN(RoutedModule):
    """``y = experts(x @ read.T) @ write + bias``.

    Args:
        read: (r, D) the base that all experts' up and gate projections share.
        experts: a routed layer of width r; its router reads the latent.
        write: (r, D) the base that all experts' down projections share.
        bias: (D,) or None.

    Attributes:
        counter: ``rows`` counts the tokens projected into the latent; the experts count the rest.
    """

    counts: ClassVar[bool] = False  # its experts count units

    def __init__(
        self, read: Tensor, experts: RoutedFFN, write: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        if read.shape != write.shape or len(read) != experts.width:
            raise BadInput(
                f"bases {tuple(read.shape)} and {tuple(write.shape)} do not fit experts of width"
                f" {experts.width}"
            )
        self.read, self.write = as_parameter(read), as_parameter(write)
        self.bias = None if bias is None else as_parameter(bias)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.expand(self.experts(self.project(x)))

    def project(self, x: Tensor) -> Tensor:
        """x (..., D) -> latents (..., r)."""
        self.counter.rows += x.numel() // x.shape[-1]
        return linear(x, self.read)

    def expand(self, latents: Tensor) -> Tensor:
        """(..., r) -> (..., D)."""
        return linear(latents, self.write.t(), self.bias)

    def dense_weights(self) -> dict[str, Tensor]:
        found = self.experts.dense_weights()
        read, write = self.read.detach().double(), self.write.detach().double()
        with torch.no_grad():
            for role in {"up", "gate"} & found.keys():
                found[role] = (found[role].double() @ read).to(self.read.dtype)
            found["down"] = (write.t() @ found["down"].double()).to(self.write.dtype)
            if self.bias is not None:
                found["down_bias"] = self.bias.detach()
        return found

    def options(self) -> dict[str, Any]:
        return {
            "width": self.read.shape[1],
            "dtype": dtype_name(self.read.dtype),
            "bias": self.bias is not None,
            "experts": self.experts.spec(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        experts = nested(options["experts"], RoutedFFN)
        width, dtype = options["width"], dtype_of(options["dtype"])
        return cls(
            torch.empty(experts.width, width, dtype=dtype),
            experts,
            torch.empty(experts.width, width, dtype=dtype),
            torch.empty(width, dtype=dtype) if options["bias"] else None,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        bases = self.read.numel() + self.write.numel()  # once per token, whatever is live
        extra = 0 if self.bias is None else self.bias.numel()
        size = self.read.element_size()
        return Cost(2 * bases, (bases + extra) * size) + self.experts.cost(active, context)

    def extra_repr(self) -> str:
        return f"width={self.read.shape[1]}, latent of {len(self.read)} features"
