"""Routed up projection of a gated layer: neurons whose gate is nearly shut are left out too.

Neuron i gives ``gate_i * up_i``. Where ``gate_i`` is small it hardly matters what ``up_i`` is, so a
token computes the products of its live inputs with its open neurons, and a shut neuron's ``up_i``
counts as what it is on average. Both selections are cut at the root of the budget, for their shares
multiply: three quarters of the inputs of three quarters of the neurons are 56 % of the operations.

What is saved is operations. Weights are stored input by input, so live inputs are runs of memory
and open neurons are not: as many bytes are read as for the live inputs alone, and eager computes
the neurons and drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.runtime.cost import Cost
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.router import own
from sparsify.runtime.spec import dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class Factor(Magnitude):
    """One of two selections whose live shares multiply to the budget: each keeps its root."""

    def wanted(self, active: float) -> float:
        return super().wanted(active**0.5)


@routed
class GatedLinear(RoutedLinear):
    """As :class:`RoutedLinear` for open neurons; ``usual`` for the others.

    Args:
        columns, bias: as there.
        select: cuts the inputs; the dial turns it.
        neurons: cuts the neurons by their gate, at the same budget.
        usual: (out,) what a shut neuron's result counts as.
    """

    usual: Tensor

    def __init__(
        self, columns: Tensor, bias: Tensor | None, select: Factor, neurons: Factor, usual: Tensor
    ) -> None:
        super().__init__(columns, bias, select)
        self.neurons = neurons
        neurons.led = True
        self.register_buffer("usual", usual.detach().to(columns.dtype))

    @classmethod
    def from_gated(
        cls, weight: Tensor, bias: Tensor | None, select: Factor, neurons: Factor, usual: Tensor
    ) -> Self:
        """From weight (out, in) and bias (out,)."""
        columns = weight.detach().t().contiguous().requires_grad_(weight.requires_grad)
        return cls(columns, None if bias is None else own(bias), select, neurons, usual)

    def follow(self) -> None:
        """Cut the neurons where the dial has set the inputs."""
        if self.neurons.setting != self.select.setting:
            self.neurons.setting = self.select.setting

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x (..., in), gates (..., out) after the activation -> (..., out)."""
        assert gates is not None  # optional only because the base class has none
        self.follow()
        width, out = self.columns.shape
        flat = x.reshape(-1, width)
        live: Tensor | None = self.select(self.select.centred(flat))
        opened: Tensor | None = self.neurons(gates.reshape(-1, out))
        pairs = float(flat.numel())
        if live is not None and opened is not None:  # as inputs of all neurons
            pairs = float((live.sum(1).double() * opened.sum(1)).sum() / out)
        self.counter.seen(len(flat), width, round(pairs))
        y = self.product(flat, live)
        if self.bias is not None:
            y = y + self.bias
        if opened is not None:
            y = torch.where(opened, y, self.usual.to(y.dtype))
        return y.to(x.dtype).view(*x.shape[:-1], out)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "neurons": self.neurons.spec()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        dtype, out = dtype_of(options["dtype"]), options["outputs"]
        return cls(
            torch.empty(options["inputs"], out, dtype=dtype),
            torch.empty(out, dtype=dtype) if options["bias"] else None,
            nested(options["select"], Factor),
            nested(options["neurons"], Factor),
            torch.empty(out, dtype=dtype),
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = self.select.active if active is None else active
        weights = self.columns.numel()
        return Cost(2 * share * weights, share**0.5 * weights * self.columns.element_size())
