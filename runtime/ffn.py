"""The routed feed-forward layer: neurons in blocks, every token computes the blocks it uses.

``y = sum over live experts e of w_e * act(x @ gate_e.T, x @ up_e.T) @ down_e  +  bias``. All three
matrices hold one neuron per row, expert after expert, so an expert (and a run of experts) is one
contiguous slice of each. With every expert live and weight one this is the dense layer, its neurons
in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import HALF, Plan, Sum, join_graph, plan
from sparsify.runtime.program import Program
from sparsify.runtime.router import Router, as_parameter
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self

linear = nn.functional.linear


@routed
class RoutedFFN(RoutedModule):
    """N experts of m neurons each, and the router that selects among them.

    Args:
        up, gate, down: (N, m, D), one neuron per row; ``gate`` None where the layer has none.
            ``down`` is the down projection transposed.
        up_bias, gate_bias: (N, m) or None; down_bias: (D,) or None.
        activation: elementwise program on (up,) or (up, gate).
        router: selects among the N experts.
        dropped: (N, D) or None: added for every expert that a token does not use (the mean of what
            it would have contributed); vanishes when all are live.
        order: int64 (F,): position i holds the dense model's neuron ``order[i]``; None = in order.
        copies: each expert is a whole dense layer (sparse upcycling), not a part of one.
    """

    order: Tensor | None

    def __init__(
        self,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        down_bias: Tensor | None,
        *,
        activation: Program,
        router: Router,
        dropped: Tensor | None = None,
        order: Tensor | None = None,
        copies: bool = False,
    ) -> None:
        super().__init__()
        _check_shapes(up, gate, down, activation, router)
        self.up = as_parameter(up)
        self.gate = None if gate is None else as_parameter(gate)
        self.down = as_parameter(down)
        self.up_bias = None if up_bias is None else as_parameter(up_bias)
        self.gate_bias = None if gate_bias is None else as_parameter(gate_bias)
        self.down_bias = None if down_bias is None else as_parameter(down_bias)
        self.dropped = None if dropped is None else as_parameter(dropped)
        self.register_buffer("order", order)
        self.activation = activation
        self.router = router
        self.copies = copies

    @classmethod
    def from_dense(
        cls,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        order: Tensor | None = None,
        experts: int,
        activation: Program,
        router: Router,
        dropped: Tensor | None = None,
        copies: bool = False,
    ) -> Self:
        """From dense layout: up, gate (F, D), down (D, F), biases (F,), (F,), (D,).

        Neuron ``order[i]`` becomes neuron i; expert e is neurons ``e*m`` to ``(e+1)*m`` of those.
        With ``copies``, every expert is the whole layer.
        """
        hidden, width = up.shape
        if not copies and hidden % experts:
            raise BadInput(
                f"{hidden} neurons do not divide into {experts} experts",
                help=f"one of: {', '.join(str(n) for n in range(2, 65) if hidden % n == 0)}",
            )

        def block(rows: Tensor | None) -> Tensor | None:
            if rows is None:
                return None
            if copies:
                packed = rows.detach().repeat(experts, *[1] * (rows.dim() - 1))
            else:
                packed = rows.detach()[order] if order is not None else rows.detach().clone()
            shaped = packed.reshape(experts, -1, *rows.shape[1:])
            return shaped.contiguous().requires_grad_(rows.requires_grad)

        ups, downs = block(up), block(down.t())
        assert ups is not None and downs is not None
        return cls(
            ups,
            block(gate),
            downs,
            block(up_bias),
            block(gate_bias),
            down_bias,
            activation=activation,
            router=router,
            dropped=dropped,
            order=None if copies else order,
            copies=copies,
        )

    # -- sizes

    @property
    def experts(self) -> int:
        """N."""
        return int(self.up.shape[0])

    @property
    def hidden(self) -> int:
        """m: neurons of one expert."""
        return int(self.up.shape[1])

    @property
    def width(self) -> int:
        """D."""
        return int(self.up.shape[2])

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        rows = x.reshape(-1, self.width)
        select = self.router(rows)
        if self.dispatch == "auto" and self.router.all_live:
            y = self._dense(rows, select if select.requires_grad else None)
        else:
            y = self._grouped(rows, select)
        return y.view(x.shape)

    def _dense(self, x: Tensor, select: Tensor | None) -> Tensor:
        """All experts live with weight one: one computation over the packed weights."""
        tokens, units = len(x), self.experts
        self.counter.seen(tokens, units, tokens * units)
        self.counter.rows += tokens * units
        hidden = self._hidden(x, *self._packed(self.up, self.gate, self.up_bias, self.gate_bias))
        hidden = hidden.to(self.down.dtype)
        if select is not None:
            hidden = hidden * select.repeat_interleave(self.hidden, dim=1)
        down = self.down.flatten(0, 1)
        return hidden @ down if self.down_bias is None else torch.addmm(self.down_bias, hidden, down)

    def _grouped(self, x: Tensor, select: Tensor) -> Tensor:
        """Each expert on the tokens that use it."""
        work = plan(select, fuse=self.dispatch == "auto")
        self.counter.seen(work.tokens, work.units, work.live)
        total = Sum(work.tokens, self.down_bias, self.width, x)
        weighted = select.requires_grad or not self.router.unit_weights
        weights = work.pairs(select) if weighted else None
        blocks = self._split(work)
        for i, segment in enumerate(work.segments):
            if not segment.count:
                continue
            up, gate, down, up_bias, gate_bias = (None if b is None else b[i] for b in blocks)
            mine = x if segment.rows is None else x.index_select(0, segment.rows)
            hidden = self._hidden(mine, *self._packed(up, gate, up_bias, gate_bias))
            if weights is not None:
                weight = weights[i].repeat_interleave(self.hidden, 1)
                hidden = hidden.to(total.dtype) * weight
            self.counter.rows += len(mine) * segment.size
            total.add(segment.rows, hidden, down.flatten(0, 1))
        y = total.value()
        if self.dropped is not None and not work.all_live:
            y = torch.addmm(y, (~work.mask).to(y.dtype), self.dropped.to(y.dtype))
        return join_graph(y, x, self.up).to(x.dtype)
