"""A projection whose weight is another layer's too, plus a low-rank residual of its own.

``y = S x + U (V x) + b`` (relaxed recursive transformers, Bae et al., arXiv:2410.20672): S is one
parameter of all tied layers, U and V are this layer's, their ranks ordered, the first live.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class TiedLinear(RoutedModule):
    """``y = x shared^T + (x down[:r]^T) up[:r] + bias``, r the live rank.

    Args:
        shared: (out, in); where it is a parameter, it is held as that very object (tied).
        up: (R, out); down: (R, in): the residual, most important rank first; a live rank is one
            run of memory in both.
        bias: (out,) or None.
        rank: the dial, of size R.
    """

    def __init__(
        self, shared: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, *, rank: Prefix
    ) -> None:
        super().__init__()
        fits = shared.shape == (up.shape[1], down.shape[1]) and len(up) == len(down) == rank.units
        if not fits:
            raise BadInput(
                f"shared {tuple(shared.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)} and"
                f" a dial of {rank.units} units do not fit"
            )
        self.shared = shared if isinstance(shared, nn.Parameter) else as_parameter(shared)
        self.up, self.down = as_parameter(up), as_parameter(down)
        self.bias = None if bias is None else as_parameter(bias)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        live, size = self.rank.count, self.rank.units
        tokens = x.numel() // x.shape[-1]
        self.counter.seen(tokens, size, tokens * live)
        down = self.down if live == size else self.down[:live]
        up = self.up if live == size else self.up[:live]
        y = nn.functional.linear(x, self.shared, self.bias)
        self.counter.rows += tokens * len(down)
        return y + nn.functional.linear(x, down) @ up

    def dense_weights(self) -> dict[str, Tensor]:
        with torch.no_grad():
            residual = self.up.double().T @ self.down.double()
            found = {"weight": (self.shared.double() + residual).to(self.shared.dtype)}
            if self.bias is not None:
                found["bias"] = self.bias.clone()
        return found

    def options(self) -> dict[str, Any]:
        return {
            "shape": list(self.shared.shape),
            "bias": self.bias is not None,
            "dtype": dtype_name(self.shared.dtype),
            "rank": self.rank.spec(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        (out, width), dtype = options["shape"], dtype_of(options["dtype"])
        rank = nested(options["rank"], Prefix)
        return cls(
            torch.empty(out, width, dtype=dtype),
            torch.empty(rank.units, out, dtype=dtype),
            torch.empty(rank.units, width, dtype=dtype),
            torch.empty(out, dtype=dtype) if options["bias"] else None,
            rank=rank,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        rank = self.rank.live_units(self.rank.active if active is None else active)
        weights = self.shared.numel() + rank * (self.up.shape[1] + self.down.shape[1])
        return Cost(2 * weights, weights * self.shared.element_size())

    def extra_repr(self) -> str:
        return f"in={self.down.shape[1]}, out={self.up.shape[1]}, rank {len(self.up)}"
