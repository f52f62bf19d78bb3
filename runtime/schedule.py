"""Sparsity schedules: the active budget as a function of the training step, from dense to sparse.

A model that starts at its dense limit and is turned down while it trains loses less than one that
is cut at once (gradual pruning, Zhu & Gupta, arXiv:1710.01878, whose cubic shape is ``cubic`` here;
EvoMoE's dense-to-sparse gate, arXiv:2112.14397, moves the same way). The schedule only turns the
dial of :mod:`sparsify.runtime.dial`; what trains, and on what loss, is the caller's business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.budget import check_active
from sparsify.runtime.dial import set_active

Shape = Literal["linear", "cosine", "cubic"]
# Progress 0..1 -> how much of the way from start to end is left, 1..0.
_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "cubic": lambda p: (1 - p) ** 3,  # fast while much is redundant, slow near the end
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """From ``start`` to ``end`` over ``steps`` steps, then ``end`` for good.

    Args:
        end: the budget to arrive at, 0 < end <= 1.
        steps: of the way; 0 = ``end`` from the first step on.
        start: the budget of step 0; 1 is the dense limit.
        shape: ``linear``, ``cosine`` or ``cubic``.
        delay: steps at ``start`` before the way begins.
        at, pass_name: which routers to turn, as in ``model.set_active``.
    """

    end: float
    steps: int
    start: float = 1.0
    shape: Shape = "cubic"
    delay: int = 0
    at: str | None = None
    pass_name: str | None = None

    def __post_init__(self) -> None:
        check_active(self.end)
        check_active(self.start)
        if self.steps < 0 or self.delay < 0:
            raise BadInput(f"a schedule cannot take {min(self.steps, self.delay)} steps")
        if self.shape not in get_args(Shape):
            raise BadInput(
                f"no schedule '{self.shape}'", help=f"one of: {', '.join(get_args(Shape))}"
            )

    def budget(self, step: int) -> float:
        """The active budget in force during ``step`` (the first step is 0)."""
        left = self.left(step)
        return self.end + (self.start - self.end) * left if left else self.end

    def left(self, step: float) -> float:
        """How much of the way is left in ``step``: 1 at its start, exactly 0 from its end on."""
        gone = step - self.delay
        if gone >= self.steps:
            return 0.0
        return _LEFT[self.shape](gone / self.steps) if gone > 0 else 1.0

    def apply(self, model: nn.Module, step: int) -> float:
        """Turn the model's dial to the budget of ``step``; returns it."""
        budget = self.budget(step)
        set_active(model, budget, at=self.at, pass_name=self.pass_name, warn=False)
        return budget
