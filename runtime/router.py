"""Routers: which units a token uses, and with what weight.

A router scores R routed units per token with one linear layer and keeps some of them by its rule
(:mod:`sparsify.runtime.rule`); the S shared units before them are always kept. What it returns,
``select`` (..., S + R), is all that routed modules see: 0 where the unit is dead for the token,
else its weight. Unless the rule says otherwise, weights are exactly one, so a model with everything
live is the dense model; gradients reach the scores straight-through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.cost import Cost
from sparsify.runtime.rule import Selection, select
from sparsify.runtime.spec import dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class Router(Budgeted):
    """Scores R routed units per token and selects among N = shared + R.

    Args:
        weight: (R, D).
        bias: (R,) or None (= zeros).
        active: budget, as a fraction of all N units.
        order: int64 (N,): the router's unit i (shared ones first) is unit ``order[i]`` of what it
            routes; None = in order.
        options: of :class:`Budgeted`.

    Attributes:
        extra, extra_bias: (E, D) and (E,), of the rule's further scores (None where it has none);
            zero at first.
        mix: (), how far weights ``scaled`` are the paper's; zero at first (None otherwise).
        correction: (R,), what balancing adds to the keys (None unless the rule balances so).
        steer: (R,) added to the scores, in units of their deviation if ``steer_relative``
            (:mod:`sparsify.runtime.steering`); not saved.
        keep: whether ``last`` keeps the scores and selection of the latest call (for losses), and
            ``last_aux`` what else the rule gives.
    """

    counts: ClassVar[bool] = False  # the modules that use the selection count
    order: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        active: float = 1.0,
        order: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        shared = self.shared
        if weight.dim() != 2 or shared < 0 or weight.shape[0] + shared < 1:
            raise BadInput(
                f"a router needs weights (units, width), not {tuple(weight.shape)} with"
                f" {shared} shared units"
            )
        if order is not None and order.numel() != weight.shape[0] + shared:
            raise BadInput(f"an order of {order.numel()} units for {weight.shape[0] + shared}")
        self.selector.check(shared, weight.shape[0])
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        # A fitted router is a plain tensor, yet it should train; only a frozen parameter does not.
        train = weight.requires_grad or not isinstance(weight, nn.Parameter)
        self.weight = as_parameter(weight, train)
        self.bias = as_parameter(bias, train)
        self.register_buffer("order", order)
        extra = self.selector.extra(shared)
        empty = weight.detach().new_zeros
        self.extra = as_parameter(empty(extra, weight.shape[1]), train) if extra else None
        self.extra_bias = as_parameter(empty(extra), train) if extra else None
        scaled = self.selector.weights == "scaled"
        self.mix = as_parameter(empty(()), train) if scaled else None
        if self.selector.corrects:
            self.correction = torch.zeros(weight.shape[0], device=weight.device)
        self.steer: Tensor | None = None
        self.steer_relative = False
        self.keep = False
        self.last: tuple[Tensor, Tensor] | None = None
        self.last_aux: dict[str, Tensor] = {}
        self.set_active(active)

    # -- the budget

    @property
    def routed(self) -> int:
        """R: units that are scored."""
        return int(self.weight.shape[0])

    # -- routing

    def scores(self, x: Tensor) -> Tensor:
        """(..., R) scores of the routed units, in float32 or wider."""
        return self._steered(_wide(nn.functional.linear(x, self.weight, self.bias)))

    def _steered(self, scores: Tensor) -> Tensor:
        if self.steer is None:
            return scores
        unit = scores.std(-1, keepdim=True) if self.steer_relative else 1.0
        return scores + unit * self.steer.to(scores)

    def extra_scores(self, x: Tensor) -> Tensor | None:
        """(..., E) the rule's further scores, or None."""
        if self.extra is None:
            return None
        return _wide(nn.functional.linear(x, self.extra, self.extra_bias))

    def select(self, x: Tensor, scores: Tensor | None = None) -> Selection:
        """x (..., D) -> the selection among the routed units."""
        scores = self.scores(x) if scores is None else scores
        scores = self.selector.perturbed(scores, self.training)
        extra = self.extra_scores(x)
        return select(
            self.selector,
            scores,
            self.cut(extra),
            self.live(scores, extra),
            shared=self.shared,
            correction=self.correction,
            mix=1.0 if self.mix is None else self.mix,
        )

    def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        """x (..., D) -> select (..., N); ``scores`` (..., R) where the caller has them already."""
        follows = self.keep or (
            torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        )
        if self.all_live and not follows:
            return x.new_ones((*x.shape[:-1], self.units))
        if scores is None:
            scores = self.scores(x)
        found = self.select(x, scores)
        weight = found.weights.to(x.dtype)
        if self.shared:
            ones = weight.new_ones((*weight.shape[:-1], self.shared))
            always = ones if found.shared is None else found.shared.to(x.dtype)
            weight = torch.cat([always, weight], dim=-1)
        if self.keep:
            self.last, self.last_aux = (scores, weight), found.aux
        if self.order is not None:
            weight = torch.zeros_like(weight).index_copy(-1, self.order, weight)
        return weight

    # -- nn.Module

    def options(self) -> dict[str, Any]:
        return {
            "routed": self.routed,
            "width": self.weight.shape[1],
            "dtype": dtype_name(self.weight.dtype),
            "order": self.order is not None,
            **self.budget_options(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(**cls.arguments(options)).restore(options)

    @classmethod
    def arguments(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``__init__`` with empty tensors of the right sizes."""
        routed, size = options["routed"], options["routed"] + options["shared"]
        return {
            "weight": torch.empty(routed, options["width"], dtype=dtype_of(options["dtype"])),
            "order": torch.empty(size, dtype=torch.int64) if options["order"] else None,
            **cls.budget_arguments(options),
        }

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        if self.unit_weights and (self.active if active is None else active) >= 1:
            return Cost()
        extra = 0 if self.extra is None else len(self.extra)
        weights = self.weight.numel() + extra * self.weight.shape[1]
        size = self.weight.element_size()
        return Cost(2 * weights, (weights + self.routed + extra) * size)

    def extra_repr(self) -> str:
        return f"{self.shared}+{self.routed} units, {self.selector}, active={self.active:g}"


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def as_parameter(tensor: Tensor, trainable: bool | None = None) -> nn.Parameter:
    """``tensor`` as a parameter of its own; ``trainable`` None keeps its ``requires_grad``."""
    grad = tensor.requires_grad if trainable is None else trainable
    return nn.Parameter(tensor.detach(), requires_grad=grad and tensor.is_floating_point())


def own(tensor: Tensor) -> Tensor:
    """A copy that trains if ``tensor`` does: a moved weight is not the dense model's any more."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
