"""Key and value projections through one shared latent: ``[k; v] = up (down x) + bias``.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as a factorisation of pretrained
projections: rows of the latent are ordered, and the first ``rank.count`` are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self

linear = torch.nn.functional.linear


@routed
class LatentProjection(RoutedModule):
    """``y = up[:, :r] (down[:r] x)``, r the live rank; other rows are projected as they were.

    Args:
        up: (K, R); down: (R, in): K factorised rows of rank R.
        others: (O, in) rows that are not factorised (queries of a fused projection), or None.
        bias: (K + O,) in the order of the result, or None.
        rank: the dial, of size R.
        places: int64 (K + O,): row of the result of every row, factorised ones first; None = in
            order.
        pieces: name -> (first, last) rows of the result that were a projection of their own.
    """

    places: Tensor | None

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        others: Tensor | None,
        bias: Tensor | None,
        *,
        rank: Prefix,
        pieces: Mapping[str, tuple[int, int]],
        places: Tensor | None = None,
    ) -> None:
        super().__init__()
        if up.shape[1] != down.shape[0] or rank.units != down.shape[0]:
            raise BadInput(
                f"up {tuple(up.shape)}, down {tuple(down.shape)} and a dial of {rank.units} units"
                " do not fit"
            )
        self.up, self.down = as_parameter(up), as_parameter(down)
        self.others = None if others is None or not len(others) else as_parameter(others)
        self.bias = None if bias is None else as_parameter(bias)
        self.rank = rank
        self.pieces = {name: (int(a), int(b)) for name, (a, b) in pieces.items()}
        self.register_buffer("places", places)

    @property
    def outputs(self) -> int:
        """K + O."""
        return len(self.up) + (0 if self.others is None else len(self.others))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., K + O)."""
        live, size = self.rank.count, len(self.down)
        tokens = x.numel() // x.shape[-1]
        self.counter.seen(tokens, size, tokens * live)
        down = self.down if live == size else self.down[:live]
        up = self.up if live == size else self.up[:, :live]
        y = linear(linear(x, down), up)
        self.counter.rows += tokens * len(down)
        if self.others is not None:
            y = torch.cat([y, linear(x, self.others)], dim=-1)
        if self.places is not None:
            y = torch.zeros_like(y).index_copy(-1, self.places, y)
        return y if self.bias is None else y + self.bias

    def dense_weights(self) -> dict[str, Tensor]:
        with torch.no_grad():
            rows = (self.up.double() @ self.down.double()).to(self.up.dtype)
            if self.others is not None:
                rows = torch.cat([rows, self.others])
            if self.places is not None:
                rows = torch.empty_like(rows).index_copy_(0, self.places, rows)
            found = {name: rows[a:b] for name, (a, b) in self.pieces.items()}
            if self.bias is not None:
                found |= {f"{n}_bias": self.bias[a:b].clone() for n, (a, b) in self.pieces.items()}
        return found

    def options(self) -> dict[str, Any]:
        return {
            "shape": [*self.up.shape, self.down.shape[1]],
            "others": 0 if self.others is None else len(self.others),
            "bias": self.bias is not None,
            "places": self.places is not None,
            "pieces": {name: list(piece) for name, piece in self.pieces.items()},
            "dtype": dtype_name(self.up.dtype),
            "rank": self.rank.spec(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        (rows, size, width), others = options["shape"], options["others"]
        dtype = dtype_of(options["dtype"])
        places = torch.empty(rows + others, dtype=torch.int64) if options["places"] else None
        return cls(
            torch.empty(rows, size, dtype=dtype),
            torch.empty(size, width, dtype=dtype),
            torch.empty(others, width, dtype=dtype),
            torch.empty(rows + others, dtype=dtype) if options["bias"] else None,
            rank=nested(options["rank"], Prefix),
            pieces={name: (a, b) for name, (a, b) in options["pieces"].items()},
            places=places,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        rank = self.rank.live_units(self.rank.active if active is None else active)
        weights = rank * (self.up.shape[0] + self.down.shape[1])
        weights += 0 if self.others is None else self.others.numel()
        return Cost(2 * weights, weights * self.up.element_size())

    def extra_repr(self) -> str:
        return f"in={self.down.shape[1]}, rank {len(self.down)}, out={self.outputs}"


@routed
class Features(RoutedModule):
    """Features ``first`` to ``last`` of its input: one of several results of one module."""

    counts = False

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        """x (..., F) -> (..., last - first)."""
        return x[..., self.first : self.last]

    def options(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(options["first"], options["last"])

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        return Cost()
