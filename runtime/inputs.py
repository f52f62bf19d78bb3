"""Routed projection: every token reads the weights of its live input features only.

The units are single input features. Their scores need no router: a feature whose value is small, or
meets a small weight column, gives little (TEAL, arXiv:2408.14690; WINA, arXiv:2505.19427). Weights
are stored (in, out), so a live feature is one run of memory and a dead one is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.cost import Cost
from sparsify.runtime.counters import Counter
from sparsify.runtime.dispatch import HALF, watched
from sparsify.runtime.router import as_parameter, own
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self

FEW = 8  # tokens up to which each reads its own features; beyond, nearly all live for some token


@routed
class Magnitude(Budgeted):
    """Scores input features by ``|x_j| * scale_j``: no weights to learn, nothing to multiply.

    Args:
        scale: (in,) what a feature's value counts for, e.g. the norm of its weight column.
        centre: (in,) what stands in for a dead feature, subtracted before the magnitude is taken;
            None = zero.
        options: of :class:`Budgeted`.
    """

    counts: ClassVar[bool] = False  # the projection counts
    scale: Tensor
    centre: Tensor | None

    def __init__(
        self, scale: Tensor, centre: Tensor | None = None, *, active: float = 1.0, **options: Any
    ) -> None:
        super().__init__(**options)
        if scale.dim() != 1 or self.shared:
            raise BadInput(f"one scale per input feature, not {tuple(scale.shape)}")
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("centre", None if centre is None else centre.detach())
        self.set_active(active)

    @property
    def routed(self) -> int:
        """R: input features."""
        return int(self.scale.numel())

    def centred(self, x: Tensor) -> Tensor:
        """x (..., in) less what stands in for its dead features."""
        return x if self.centre is None else x - self.centre

    def scores(self, x: Tensor) -> Tensor:
        """x (..., in), centred -> (..., in), in float32."""
        return x.detach().float().abs() * self.scale

    def forward(self, x: Tensor) -> Tensor | None:
        """x (..., in), centred -> bool (..., in), which are live; None = all (none are scored)."""
        return None if self.all_live else self.live(self.scores(x))

    def options(self) -> dict[str, Any]:
        centre = None if self.centre is None else dtype_name(self.centre.dtype)
        return {"features": self.routed, "centre": centre, **self.budget_options()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        size, centre = options["features"], options["centre"]
        return cls(
            torch.empty(size),
            None if centre is None else torch.empty(size, dtype=dtype_of(centre)),
            **cls.budget_arguments(options),
        ).restore(options)

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        return Cost()

    def extra_repr(self) -> str:
        return f"{self.routed} features, {self.rule}, active={self.active:g}"


@routed
class RoutedLinear(RoutedModule):
    """``y = offset + sum over live j of (x_j - centre_j) * columns[j] + bias``.

    With every feature live this is ``x @ columns + bias``, for ``offset = centre @ columns``. The
    selection has no gradient of its own (a threshold's is zero almost everywhere); a feature that
    is dead for a token passes none back to it.

    Where it trains (``dispatch="masked"``) dead features are replaced by their centres before the
    product, so what is given follows columns and centre while they move, and both get gradients;
    :meth:`retie` then makes ``offset`` theirs again.

    Args:
        columns: (in, out), the transposed weight.
        bias: (out,) or None.
        select: scores and cuts; its ``centre`` is what dead features are taken to be.
    """

    def __init__(self, columns: Tensor, bias: Tensor | None, select: Magnitude) -> None:
        super().__init__()
        self.columns = as_parameter(columns)
        self.bias = None if bias is None else as_parameter(bias)
        self.select = select
        self.offset = None
        if select.centre is not None:
            offset = select.centre.to(columns.dtype) @ columns.detach()
            self.offset = as_parameter(offset, columns.requires_grad)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, select: Magnitude) -> Self:
        """From weight (out, in) and bias (out,)."""
        columns = weight.detach().t().contiguous().requires_grad_(weight.requires_grad)
        return cls(columns, None if bias is None else own(bias), select)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        found: Tensor | None = self.lowered(x)
        if found is not None:
            return found
        width, out = self.columns.shape
        flat = x.reshape(-1, width)
        live: Tensor | None = self.select(self.select.centred(flat))
        self.counter.seen(len(flat), width, flat.numel() if live is None else int(live.sum()))
        y = self.product(flat, live)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], out)

    def product(self, x: Tensor, live: Tensor | None) -> Tensor:
        """x (T, in), not centred, over its live (T, in) features (None = all) -> (T, out)."""
        centre = self.select.centre
        if self.dispatch == "masked":
            self.counter.rows += x.numel()
            if live is not None:
                x = x.masked_fill(~live, 0.0) if centre is None else _replaced(x, live, centre)
            return x @ self.columns
        flat = self.select.centred(x)
        if live is None:
            self.counter.rows += flat.numel()
            y = flat @ self.columns
        else:
            few = 0 < len(x) <= FEW and x.device.type == "cpu" and x.dtype not in HALF
            if few and not watched(x, self):
                y = read_few(flat, live, self.columns, self.counter)
            else:
                left, right = used_only(flat.masked_fill(~live, 0.0), live, self.columns)
                self.counter.rows += left.numel()
                y = left @ right
        return y if self.offset is None else y + self.offset

    @torch.no_grad()
    def retie(self) -> None:
        """Set ``offset`` to what centre and columns give, after a change of either."""
        if self.offset is not None and self.select.centre is not None:
            self.offset.copy_(self.select.centre.to(self.columns.dtype) @ self.columns)

    def dense_weights(self) -> dict[str, Tensor]:
        found = {"weight": self.columns.detach().t()}
        if self.bias is not None:
            found["bias"] = self.bias.detach()
        return found

    def options(self) -> dict[str, Any]:
        return {
            "inputs": self.columns.shape[0],
            "outputs": self.columns.shape[1],
            "bias": self.bias is not None,
            "dtype": dtype_name(self.columns.dtype),
            "select": self.select.spec(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        dtype = dtype_of(options["dtype"])
        return cls(
            torch.empty(options["inputs"], options["outputs"], dtype=dtype),
            torch.empty(options["outputs"], dtype=dtype) if options["bias"] else None,
            nested(options["select"], Magnitude),
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = self.select.active if active is None else active
        weights = share * self.columns.numel()
        return Cost(2 * weights, weights * self.columns.element_size())

    def extra_repr(self) -> str:
        return f"in={self.columns.shape[0]}, out={self.columns.shape[1]}"


def _replaced(x: Tensor, live: Tensor, centre: Tensor) -> Tensor:
    """x (T, in) with its dead features at their centres."""
    return torch.where(live, x, centre.to(x.dtype))


def read_few(x: Tensor, live: Tensor, columns: Tensor, counter: Counter) -> Tensor:
    """``x (T, in) @ columns (in, out)`` where live: each token reads its rows and no others."""
    token, feature = live.nonzero(as_tuple=True)
    starts = torch.nn.functional.pad(live.sum(1).cumsum(0)[:-1], (1, 0))
    counter.rows += len(feature)
    return torch.nn.functional.embedding_bag(
        feature, columns, starts, mode="sum", per_sample_weights=x[token, feature]
    )


def used_only(x: Tensor, live: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``columns`` without the features that no token uses; x is zero where dead."""
    used = live.any(0)
    at = used.nonzero().flatten()
    if len(at) == len(used):
        return x, columns
    return x.index_select(1, at), columns.index_select(0, at)
