"""Routers: which units a token uses, and with what weight.

A router scores R routed units per token with one linear layer and keeps some of them; the S shared
units before them are always kept. What it returns, ``select`` (..., S + R), is all that routed
modules see: 0 where the unit is dead for the token, else its weight. Weights are exactly one, so a
model with everything live is the dense model; gradients reach the scores straight-through.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self

ERROR_POINTS = 65  # of an error table
Rule = Literal["top-k", "threshold", "softmax-top-k"]


@routed
class Router(RoutedModule):
    """Scores R routed units per token and selects among N = shared + R.

    Args:
        weight: (R, D).
        bias: (R,) or None (= zeros).
        shared: units that every token uses; they come first.
        rule: ``top-k`` keeps the same number of units for every token; ``threshold`` keeps those
            that score above one value, so that tokens take as many as they need and the budget
            holds on average; ``softmax-top-k`` keeps k and weights them by the softmax of their
            scores, which sum to one.
        active: budget, as a fraction of all N units.
        quantiles: (Q,) ascending scores of calibration tokens, pooled over tokens and units, at the
            probabilities 0, 1/(Q-1), ..., 1; ``threshold`` needs them (see :meth:`calibrate`).
        settled: (S, 2) rows of a budget and what to add to the threshold there, ascending (see
            :meth:`settle`), where other passes' routers are turned down as far; settled_alone: the
            same where only this router's pass is.
        order: int64 (N,): the router's unit i (shared ones first) is unit ``order[i]`` of what it
            routes; None = in order.
        errors: (P,) what is lost per token when the lowest 0, 1/(P-1), ..., 1 of all (token, unit)
            scores are dead, on one scale for all layers (see :meth:`calibrate`); with it, a budget
            for several layers goes where it saves most (:mod:`sparsify.runtime.dial`).

    Attributes:
        k_exact: routed units a token keeps under the top-k rules, where the owner of several layers
            spreads rounding over them; None = rounded here.
        company: how far the routers of other passes are turned down too, between 0 (not at all) and
            1 (as far as this one); mixes the two settled tables.
        keep: whether ``last`` keeps the scores and selection of the latest call (for losses).
    """

    dial: ClassVar[bool] = True  # set_active on a whole model turns modules that carry this mark
    counts: ClassVar[bool] = False  # the modules that use the selection count
    quantiles: Tensor | None
    errors: Tensor | None
    settled: Tensor | None
    settled_alone: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        shared: int = 0,
        rule: Rule = "top-k",
        active: float = 1.0,
        quantiles: Tensor | None = None,
        order: Tensor | None = None,
        errors: Tensor | None = None,
        settled: Tensor | None = None,
        settled_alone: Tensor | None = None,
    ) -> None:
        super().__init__()
        if rule not in get_args(Rule):
            raise BadInput(f"no routing rule '{rule}'", help=f"one of: {', '.join(get_args(Rule))}")
        if rule == "softmax-top-k" and shared:
            raise BadInput(
                "softmax-top-k routing cannot have shared units",
                why="its weights sum to one over the routed units alone",
            )
        if weight.dim() != 2 or shared < 0 or weight.shape[0] + shared < 1:
            raise BadInput(
                f"a router needs weights (units, width), not {tuple(weight.shape)} with"
                f" {shared} shared units"
            )
        if order is not None and order.numel() != weight.shape[0] + shared:
            raise BadInput(f"an order of {order.numel()} units for {weight.shape[0] + shared}")
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        # A fitted router is a plain tensor, yet it should train; only a frozen parameter does not.
        train = weight.requires_grad or not isinstance(weight, nn.Parameter)
        self.weight = as_parameter(weight, train)
        self.bias = as_parameter(bias, train)
        self.register_buffer("quantiles", None if quantiles is None else quantiles.float())
        self.register_buffer("errors", None if errors is None else errors.float())
        self.register_buffer("settled", None if settled is None else settled.float())
        alone = None if settled_alone is None else settled_alone.float()
        self.register_buffer("settled_alone", alone)
        self.register_buffer("order", order)
        self.shared = shared
        self.rule: Rule = rule
        self.active = 1.0
        self.k_exact: int | None = None
        self.company = 1.0
        self.keep = False
        self.last: tuple[Tensor, Tensor] | None = None
        self._cut: float | None = None
        self.set_active(active)

    # -- the budget

    @property
    def routed(self) -> int:
        """R: units that are scored."""
        return int(self.weight.shape[0])

    @property
    def units(self) -> int:
        """N: all units, shared ones first."""
        return self.shared + self.routed

    @property
    def unit_weights(self) -> bool:
        """Whether live units have weight one."""
        return self.rule != "softmax-top-k"

    @property
    def all_live(self) -> bool:
        """Whether every unit is live for every token, with weight one."""
        return self.unit_weights and self.budget == self.routed

    @property
    def budget(self) -> float:
        """Routed units that a token keeps (on average, under ``threshold``)."""
        if self.k_exact is not None and self.rule != "threshold":
            return self.k_exact
        wanted = self.wanted(self.active)
        return wanted if self.rule == "threshold" else math.floor(wanted + 0.5)

    def wanted(self, active: float) -> float:
        """Routed units that meet ``active``, not yet rounded: at least one unit in total."""
        least = 0.0 if self.shared else 1.0
        return min(max(active * self.units - self.shared, least), float(self.routed))

    def live_units(self, active: float) -> float:
        """Units that a token uses at the budget ``active``, on average."""
        return self.shared + self.wanted(active)

    def clamped(self, active: float) -> bool:
        """Whether the shared units alone exceed the budget ``active``."""
        return self.shared > active * self.units + 0.5

    def set_active(self, active: float, *, k_exact: int | None = None, warn: bool = True) -> None:
        """Set the budget to the fraction ``active`` of all units, shared ones included.

        Args:
            k_exact: routed units per token, where the caller rounds (top-k rules).
            warn: say so where the shared units alone exceed the budget; they stay live then.
        """
        check_active(active)
        if k_exact is not None and not 0 <= k_exact <= self.routed:
            raise BadInput(f"a router of {self.routed} routed units cannot keep {k_exact}")
        if self.rule == "threshold" and self.quantiles is None and active < 1:
            raise BadInput(
                "threshold routing needs a table of calibrated scores",
                why="the threshold for a budget is read off the scores of real tokens",
                help="call router.calibrate(x) with sample inputs, or use top-k routing",
            )
        if warn and self.clamped(active):
            warnings.warn(over_budget(active, [("router", self)]), stacklevel=2)
        self.active = float(active)
        self.k_exact = k_exact
        self._cut = None

    @property
    def setting(self) -> tuple[float, int | None, float]:
        """What the dial sets; assign it to turn the dial back."""
        return self.active, self.k_exact, self.company

    @setting.setter
    def setting(self, value: tuple[float, int | None, float]) -> None:
        active, exact, self.company = value
        self.set_active(active, k_exact=exact, warn=False)

    def calibrate(self, x: Tensor, losses: Tensor | None = None, points: int = 1025) -> None:
        """Fill the quantile table from sample inputs, and the error table from losses.

        Args:
            x: (..., D).
            losses: (..., R) what each token loses if the unit is dead, on one scale for all layers.
            points: of the quantile table.
        """
        with torch.no_grad():
            pooled, ranks = self.scores(x).flatten().sort()
            if losses is not None:
                lost = losses.flatten()[ranks].double().cumsum(0) * (self.routed / len(ranks))
                dead = torch.linspace(0, len(ranks), ERROR_POINTS, dtype=torch.float64).long()
                self.errors = torch.cat([lost.new_zeros(1), lost])[dead].float()
            at = torch.linspace(0, pooled.numel() - 1, points, device=x.device, dtype=torch.float64)
            low = at.floor().long()
            high = at.ceil().long()
            part = (at - low).float()
            self.quantiles = torch.lerp(pooled[low].float(), pooled[high].float(), part)
        self.settled = self.settled_alone = None
        self._cut = None

    def settle(self, scores: Tensor, *, alone: bool = False) -> None:
        """Make the present budget hold on ``scores`` (..., R), seen in the sparse model.

        What that adds to the threshold is kept for this budget and interpolated between budgets;
        at budget one nothing is added.

        Args:
            alone: the other passes' routers keep everything live.
        """
        share = self.budget / self.routed
        if self.rule != "threshold" or self.quantiles is None or not 0 < share < 1:
            return
        pooled = scores.detach().flatten().sort().values.float()
        shift = _quantile(pooled, 1 - share) - _quantile(self.quantiles, 1 - share)
        name = "settled_alone" if alone else "settled"
        table = getattr(self, name)
        rows = [] if table is None else table.tolist()
        rows = [row for row in rows if abs(row[0] - self.active) > 1e-3]
        rows = sorted([*rows, [self.active, shift]])
        setattr(self, name, torch.tensor(rows, device=self.quantiles.device))
        self._cut = None

    def _shift(self) -> float:
        """What settling adds to the threshold at the present budget."""
        alone = _interpolated(self.settled_alone, self.active)
        if self.settled is None:
            return alone
        company = 1.0 if self.settled_alone is None else self.company
        return alone + company * (_interpolated(self.settled, self.active) - alone)

    @property
    def threshold(self) -> float:
        """Scores above this are live under ``threshold``."""
        if self._cut is None:
            self._cut = self._read_threshold()
        return self._cut

    def _read_threshold(self) -> float:
        share = self.budget / self.routed if self.routed else 1.0
        if share >= 1:
            return -math.inf
        if share <= 0 or self.quantiles is None:
            return math.inf
        return _quantile(self.quantiles, 1 - share) + self._shift()

    # -- routing

    def scores(self, x: Tensor) -> Tensor:
        """(..., R) scores of the routed units, in float32 or wider."""
        scores = nn.functional.linear(x, self.weight, self.bias)
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        """x (..., D) -> select (..., N); ``scores`` (..., R) where the caller has them already."""
        follows = self.keep or (
            torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        )
        if self.all_live and not follows:
            return x.new_ones((*x.shape[:-1], self.units))
        if scores is None:
            scores = self.scores(x)
        live = self.live(scores)
        if self.rule == "softmax-top-k":
            kept = scores.masked_fill(~live, -math.inf)
            weight = torch.softmax(kept, dim=-1).to(x.dtype)
        elif scores.requires_grad:
            s = torch.sigmoid(scores).nan_to_num()
            weight = torch.where(live, 1 + (s - s.detach()), 0.0).to(x.dtype)
        else:
            weight = live.to(x.dtype)
        if self.shared:
            weight = torch.cat([weight.new_ones((*weight.shape[:-1], self.shared)), weight], dim=-1)
        if self.keep:
            self.last = (scores, weight)
        if self.order is not None:
            weight = torch.zeros_like(weight).index_copy(-1, self.order, weight)
        return weight

    def live(self, scores: Tensor) -> Tensor:
        """scores (..., R) -> bool (..., R). Ties go to the lower unit."""
        kept = self.budget
        if kept >= self.routed:
            return torch.ones_like(scores, dtype=torch.bool)
        if self.rule == "threshold":
            return scores > self.threshold
        # torch.topk breaks ties as it likes; a stable sort makes the choice reproducible.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : int(kept)]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)

    # -- nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = ("quantiles", "errors", "settled", "settled_alone")
        tables = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in tables.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                # ``model.half()`` must not round thresholds: neighbouring budgets would coincide.
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._cut = None

    def options(self) -> dict[str, Any]:
        return {
            "routed": self.routed,
            "width": self.weight.shape[1],
            "dtype": dtype_name(self.weight.dtype),
            "shared": self.shared,
            "rule": self.rule,
            "active": self.active,
            "k_exact": self.k_exact,
            "quantiles": None if self.quantiles is None else self.quantiles.numel(),
            "order": self.order is not None,
            "errors": None if self.errors is None else self.errors.numel(),
            "settled": None if self.settled is None else len(self.settled),
            "settled_alone": None if self.settled_alone is None else len(self.settled_alone),
            "company": self.company,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        points, errors, settled, alone = (
            options[k] for k in ("quantiles", "errors", "settled", "settled_alone")
        )
        router = cls(
            torch.empty(options["routed"], options["width"], dtype=dtype_of(options["dtype"])),
            shared=options["shared"],
            rule=options["rule"],
            quantiles=None if points is None else torch.empty(points),
            order=torch.empty(options["routed"] + options["shared"], dtype=torch.int64)
            if options["order"]
            else None,
            errors=None if errors is None else torch.empty(errors),
            settled=None if settled is None else torch.empty(settled, 2),
            settled_alone=None if alone is None else torch.empty(alone, 2),
        )
        router.setting = options["active"], options["k_exact"], options["company"]
        return router

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        if self.unit_weights and (self.active if active is None else active) >= 1:
            return Cost()
        weights = self.weight.numel()
        return Cost(2 * weights, (weights + self.routed) * self.weight.element_size())

    def extra_repr(self) -> str:
        return f"{self.shared}+{self.routed} units, {self.rule}, active={self.active:g}"


def _quantile(ascending: Tensor, probability: float) -> float:
    """Interpolated quantile of sorted values."""
    at = probability * (ascending.numel() - 1)
    low = math.floor(at)
    a, b = ascending[low].item(), ascending[math.ceil(at)].item()
    return a + (b - a) * (at - low)


def _interpolated(table: Tensor | None, at: float) -> float:
    """The second column of (S, 2) rows at a place in the first; zero at one, and without rows."""
    if table is None:
        return 0.0
    rows = [*table.tolist(), [1.0, 0.0]]
    below = [row for row in rows if row[0] <= at] or rows[:1]
    above = [row for row in rows if row[0] >= at] or rows[-1:]
    (a, one), (b, two) = below[-1], above[0]
    return float(one if a == b else one + (two - one) * (at - a) / (b - a))


def check_active(active: float) -> None:
    """BadInput unless ``active`` is a number in (0, 1]."""
    number = isinstance(active, int | float) and not isinstance(active, bool)
    if not number or not 0 < active <= 1:
        raise BadInput(
            f"active={active!r} is not a budget",
            why="it is the fraction of units that a token uses: above 0, at most 1",
            help="active=0.5 uses half of the units; active=1 is the dense model",
        )


def over_budget(active: float, routers: Sequence[tuple[str, Router]]) -> str:
    """The warning for routers whose shared units alone exceed the budget."""
    path, router = routers[0]
    more = f" (and {len(routers) - 1} more)" if len(routers) > 1 else ""
    return (
        f"active={active:g} is below the shared units of {path}{more}: {router.shared} of"
        f" {router.units} units are used by every token, so {router.shared / router.units:.3g} of"
        " them stay live. Convert with fewer shared units to go lower."
    )


def as_parameter(tensor: Tensor, trainable: bool | None = None) -> nn.Parameter:
    """``tensor`` as a parameter of its own; ``trainable`` None keeps its ``requires_grad``."""
    grad = tensor.requires_grad if trainable is None else trainable
    return nn.Parameter(tensor.detach(), requires_grad=grad and tensor.is_floating_point())


def own(tensor: Tensor) -> Tensor:
    """A copy that trains if ``tensor`` does: a moved weight is not the dense model's any more."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
