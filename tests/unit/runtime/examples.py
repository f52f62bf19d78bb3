"""Small routed modules and their dense meaning, for the tests of this folder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router

SILU = Program(
    ("up", "gate"),
    (
        Step("s", "aten.silu.default", (Ref("gate"),)),
        Step("h", "aten.mul.Tensor", (Ref("s"), Ref("up"))),
    ),
    "h",
)
GELU = Program(("up",), (Step("h", "aten.gelu.default", (Ref("up"),)),), "h")


def score(width: int, *, mask: str = "", softmax: str = "aten._safe_softmax.default") -> Program:
    """Scores of sdpa with a ``float`` or ``bool`` mask, or none."""
    steps = [Step("scaled", "aten.mul.Tensor", (Ref("scores"), 1 / math.sqrt(width)))]
    last = "scaled"
    if mask == "float":
        steps.append(Step("masked", "aten.add.Tensor", (Ref(last), Ref("op0"))))
        last = "masked"
    elif mask == "bool":
        steps.append(Step("dead", "aten.logical_not.default", (Ref("op0"),)))
        filled = (Ref(last), Ref("dead"), -math.inf)
        steps.append(Step("masked", "aten.masked_fill.Scalar", filled))
        last = "masked"
    steps.append(Step("p", softmax, (Ref(last), -1)))
    return Program(("scores", "op0") if mask else ("scores",), tuple(steps), "p")


class Dense:
    """A dense feed-forward layer and its routed form."""

    def __init__(
        self,
        *,
        width: int = 12,
        hidden: int = 24,
        experts: int = 6,
        shared: int = 1,
        gated: bool = True,
        bias: bool = True,
        dropped: bool = False,
        dtype: torch.dtype = torch.float64,
        active: float = 1.0,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=g, dtype=torch.float64) / 3).to(dtype)

        self.up, self.gate = draw(hidden, width), draw(hidden, width) if gated else None
        self.down = draw(width, hidden)
        self.up_bias = draw(hidden) if bias else None
        self.gate_bias = draw(hidden) if bias and gated else None
        self.down_bias = draw(width) if bias else None
        self.dropped = draw(experts, width) if dropped else None
        self.order = torch.randperm(hidden, generator=g)
        self.activation = SILU if gated else GELU
        self.experts, self.width, self.dtype, self.g = experts, width, dtype, g
        self.router = Router(
            draw(experts - shared, width) * 5,
            draw(experts - shared),
            shared=shared,
            active=active,
        )

    def x(self, *shape: int) -> Tensor:
        """Random input (*shape, width)."""
        drawn = torch.randn((*shape, self.width), generator=self.g, dtype=torch.float64)
        return drawn.to(self.dtype)

    def routed(self) -> RoutedFFN:
        """The routed form."""
        return RoutedFFN.from_dense(
            self.up,
            self.gate,
            self.down,
            self.up_bias,
            self.gate_bias,
            self.down_bias,
            order=self.order,
            experts=self.experts,
            activation=self.activation,
            router=self.router,
            dropped=self.dropped,
        )

    def hidden(self, x: Tensor) -> Tensor:
        """Neurons of the dense layer."""
        linear = torch.nn.functional.linear
        sums = [linear(x, self.up, self.up_bias)]
        if self.gate is not None:
            sums.append(linear(x, self.gate, self.gate_bias))
        return self.activation(*sums)

    def __call__(self, x: Tensor, select: Tensor | None = None) -> Tensor:
        """The dense layer; with ``select``, computed in full and masked: the routed meaning."""
        hidden = self.hidden(x)
        if select is not None:
            weight = torch.zeros_like(hidden)
            per_neuron = select.repeat_interleave(hidden.shape[-1] // self.experts, dim=-1)
            weight[..., self.order] = per_neuron.to(weight)
            hidden = hidden * weight
        y = torch.nn.functional.linear(hidden, self.down, self.down_bias)
        if select is not None and self.dropped is not None:
            y = y + (select == 0).to(y) @ self.dropped
        return y
