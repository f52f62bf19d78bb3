"""Budgets: how many of its units a module may use per token, and the cut that keeps to it.

A budgeted module scores R units per token; S more are shared (always used) and are not scored. How
many it keeps follows from one dial, ``active``: the same number for every token (top-k), or all
that score above a threshold read off the scores of calibration tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.rule import Cut, RoutingRule, mask_of
from sparsify.runtime.rules import rule_of
from sparsify.runtime.spec import RoutedModule

if TYPE_CHECKING:
    from typing_extensions import Self

ERROR_POINTS = 65  # of an error table
TABLES = ("quantiles", "errors", "settled", "settled_alone")
Rule = str  # a rule's name


class Budgeted(RoutedModule):
    """The dial of a module that selects among N = shared + routed units.

    Subclasses say how units are scored (:meth:`scores`) and how many are (:attr:`routed`).

    Args:
        shared: units that every token uses; they come first.
        rule: how units are selected, by name or as an object (:mod:`sparsify.runtime.rules`).
        rule_options: of a rule given by name.
        quantiles: (Q,) ascending keys of calibration tokens, pooled over tokens and units, at the
            probabilities 0, 1/(Q-1), ..., 1; (Q, R) for rules with a threshold per unit. Some rules
            need them (see :meth:`calibrate`). A key is what a rule compares: the score, mostly.
        errors: (P,) what is lost per token when the lowest 0, 1/(P-1), ..., 1 of all (token, unit)
            scores are dead, on one scale for all layers (see :meth:`calibrate`); with it, a budget
            for several layers goes where it saves most (:mod:`sparsify.runtime.dial`).
        settled: (S, 2) rows of a budget and what to add to the threshold there, ascending (see
            :meth:`settle`), where other passes' routers are turned down as far; settled_alone: the
            same where only this router's pass is.

    Attributes:
        selector: the rule.
        unit_cost: what one unit of one token costs, in any measure shared by the routers of a pass
            (multiply-adds): a budget for several layers is a share of their summed cost.
        active: budget, as a fraction of all N units.
        k_exact: routed units a token keeps under the top-k rules, where the owner of several layers
            spreads rounding over them; None = rounded here.
        company: how far the routers of other passes are turned down too, between 0 (not at all) and
            1 (as far as this one); mixes the two settled tables.
        drift: added to one threshold for all units while scores change in training; not saved.
        led: set to what another router of the same module is; the dial passes it over.
    """

    led: bool = False

    quantiles: Tensor | None
    errors: Tensor | None
    settled: Tensor | None
    settled_alone: Tensor | None
    correction: Tensor | None

    def __init__(
        self,
        *,
        shared: int = 0,
        rule: Rule | RoutingRule = "top-k",
        rule_options: Mapping[str, Any] | None = None,
        quantiles: Tensor | None = None,
        errors: Tensor | None = None,
        settled: Tensor | None = None,
        settled_alone: Tensor | None = None,
        unit_cost: float = 1.0,
    ) -> None:
        super().__init__()
        self.selector = rule_of(rule, dict(rule_options or {}))
        tables = (quantiles, errors, settled, settled_alone)
        for name, table in zip(TABLES, tables, strict=True):
            self.register_buffer(name, None if table is None else table.float())
        self.register_buffer("correction", None)  # a router's whose rule balances by biases
        self.shared = shared
        self.unit_cost = unit_cost
        self.active = 1.0
        self.k_exact: int | None = None
        self.company = 1.0
        self.drift = 0.0
        self._cut: float | Tensor | None = None
        self.turns = 0  # of the dial, the rule or the tables: whatever was read off them is as old

    def changed(self) -> None:
        """Drop what was read off the tables; kernels look at ``turns``."""
        self._cut = None
        self.turns += 1

    # -- what a subclass defines

    @property
    def routed(self) -> int:
        """R: units that are scored."""
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., R) scores of the routed units, in float32 or wider."""
        raise NotImplementedError

    # -- the rule

    @property
    def rule(self) -> Rule:
        """The rule's name; assign a name or a rule to change it."""
        return self.selector.name

    @rule.setter
    def rule(self, rule: Rule | RoutingRule) -> None:
        self.selector = rule_of(rule)
        self.changed()

    def keys(self, scores: Tensor) -> Tensor:
        """scores (..., R) -> (..., R): what the rule ranks or cuts."""
        return self.selector.keys(scores, self.correction)

    # -- sizes

    @property
    def units(self) -> int:
        """N: all units, shared ones first."""
        return self.shared + self.routed

    @property
    def unit_weights(self) -> bool:
        """Whether live units have weight one."""
        return self.selector.weights == "one"

    @property
    def all_live(self) -> bool:
        """Whether every unit is live for every token, with weight one."""
        return self.unit_weights and self.budget == self.routed

    @property
    def budget(self) -> float:
        """Routed units that a token keeps (on average, under rules that cut)."""
        if self.k_exact is not None and not self.selector.mean:
            return self.k_exact
        return self.selector.whole(self.wanted(self.active), 0.0 if self.shared else 1.0)

    def wanted(self, active: float) -> float:
        """Routed units that meet ``active``, not yet rounded: at least one unit in total."""
        least = 0.0 if self.shared else 1.0
        return min(max(active * self.units - self.shared, least), float(self.routed))

    def live_units(self, active: float) -> float:
        """Units that a token uses at the budget ``active``, on average."""
        return self.shared + self.wanted(active)

    def live_share(self, unit: int | None = None) -> float:
        """Share of tokens that use ``unit`` at the present budget; None = mean over all units."""
        return self.active

    def clamped(self, active: float) -> bool:
        """Whether the shared units alone exceed the budget ``active``."""
        return self.shared > active * self.units + 0.5

    def set_active(self, active: float, *, k_exact: int | None = None, warn: bool = True) -> None:
        """Set the budget to the fraction ``active`` of all units, shared ones included.

        Args:
            k_exact: routed units per token, where the caller rounds (rules that count).
            warn: say so where the shared units alone exceed the budget; they stay live then.
        """
        check_active(active)
        step = self.selector.step
        if k_exact is not None and (not 0 <= k_exact <= self.routed or k_exact % step):
            raise BadInput(
                f"a router of {self.routed} routed units cannot keep {k_exact}",
                help=f"a multiple of {step}" if step > 1 else None,
            )
        if self.selector.table and self.quantiles is None and active < 1:
            raise BadInput(
                f"{self.rule} routing needs a table of calibrated scores",
                why="the threshold for a budget is read off the scores of real tokens",
                help="call router.calibrate(x) with sample inputs, or use top-k routing",
            )
        if warn and self.clamped(active):
            warnings.warn(over_budget(active, [("router", self)]), stacklevel=2)
        self.active = float(active)
        self.k_exact = k_exact
        self.changed()

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
            keys = self.keys(self.scores(x))
            if self.selector.per_unit:
                pooled, ranks = keys.reshape(-1, self.routed).sort(dim=0)
                losses = None  # they follow pooled ranks
            else:
                pooled, ranks = keys.flatten().sort()
            if losses is not None:
                self.errors = error_table(losses.flatten()[ranks], self.routed / len(ranks))
            at = torch.linspace(0, len(pooled) - 1, points, device=x.device, dtype=torch.float64)
            low = at.floor().long()
            high = at.ceil().long()
            part = (at - low).float().view(-1, *[1] * (pooled.dim() - 1))
            self.quantiles = torch.lerp(pooled[low].float(), pooled[high].float(), part)
        self.settled = self.settled_alone = None
        self.changed()

    def settle(self, scores: Tensor, *, alone: bool = False) -> None:
        """Make the present budget hold on ``scores`` (..., R), seen in the sparse model.

        What that adds to the threshold is kept for this budget and interpolated between budgets;
        at budget one nothing is added.

        Args:
            alone: the other passes' routers keep everything live.
        """
        share = self.budget / self.routed
        rule = self.selector
        if not rule.mean or rule.per_unit or self.quantiles is None or not 0 < share < 1:
            return
        keys = self.keys(scores.detach())
        shift = _selected(keys, 1 - share) - quantile(self.quantiles, 1 - share)
        name = "settled_alone" if alone else "settled"
        table = getattr(self, name)
        rows = [] if table is None else table.tolist()
        rows = [row for row in rows if abs(row[0] - self.active) > 1e-3]
        rows = sorted([*rows, [self.active, shift]])
        setattr(self, name, torch.tensor(rows, device=self.quantiles.device))
        self.changed()

    def _shift(self) -> float:
        """What settling adds to the threshold at the present budget."""
        alone = _interpolated(self.settled_alone, self.active)
        if self.settled is None:
            return alone
        company = 1.0 if self.settled_alone is None else self.company
        return alone + company * (_interpolated(self.settled, self.active) - alone)

    @property
    def threshold(self) -> float | Tensor:
        """Keys above this are live under rules that cut: one number, or (R,) one per unit."""
        cut = self._cut
        if cut is None:  # past __setattr__: what is only looked up is no change that counts
            cut = self.__dict__["_cut"] = self._read_threshold()
        return cut

    def _read_threshold(self) -> float | Tensor:
        share = self.budget / self.routed if self.routed else 1.0
        if share >= 1:
            return -math.inf
        if share <= 0:
            return math.inf
        if self.quantiles is None:
            return self.selector.default_cut(share)
        if self.selector.per_unit:
            return _row(self.quantiles, 1 - share)
        return quantile(self.quantiles, 1 - share) + self._shift() + self.drift

    def cut(self, extra: Tensor | None = None) -> Cut:
        """Where the rule cuts at the present budget; ``extra`` are its further scores."""
        threshold = self.threshold if self.selector.mean else math.inf
        return Cut(self.budget, threshold, self.training, extra)

    def live(self, scores: Tensor, extra: Tensor | None = None) -> Tensor:
        """scores (..., R) -> bool (..., R). Ties go to the lower unit."""
        return mask_of(self.selector, scores, self.cut(extra), self.correction)

    # -- nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        tables = {name: getattr(self, name) for name in (*TABLES, "correction")}
        super()._apply(fn, recurse)
        for name, before in tables.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                # ``model.half()`` must not round thresholds: neighbouring budgets would coincide.
                setattr(self, name, before.to(after.device))
        self.changed()
        return self

    def budget_options(self) -> dict[str, Any]:
        """The JSON form of what this class holds."""
        sizes = {n: None if (t := getattr(self, n)) is None else len(t) for n in TABLES}
        rule_options = self.selector.options()
        return {
            "shared": self.shared,
            "rule": self.rule,
            **({"rule_options": rule_options} if rule_options else {}),
            "active": self.active,
            "k_exact": self.k_exact,
            "company": self.company,
            "unit_cost": self.unit_cost,
            **sizes,
        }

    @staticmethod
    def budget_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``__init__`` with empty tables of the right sizes."""
        rule = rule_of(options["rule"], options.get("rule_options"))
        found: dict[str, Any] = {"shared": options["shared"], "rule": rule}
        found["unit_cost"] = options.get("unit_cost", 1.0)
        for name in TABLES:
            size = options[name]
            columns: tuple[int, ...] = (2,) if name.startswith("settled") else ()
            if name == "quantiles" and rule.per_unit:
                columns = (options["routed"],)
            found[name] = None if size is None else torch.empty(size, *columns)
        return found

    def restore(self, options: Mapping[str, Any]) -> Self:
        """Turn the dial to where ``budget_options`` saw it."""
        self.setting = options["active"], options["k_exact"], options["company"]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.changed()


def error_table(losses: Tensor, scale: float = 1.0) -> Tensor:
    """(P,) float32: what is lost when the first 0, 1/(P-1), ..., 1 of the units are dead.

    Args:
        losses: (n,) what each unit's death costs, in the order in which they die.
        scale: on the sums.
    """
    lost = losses.double().cumsum(0) * scale
    dead = torch.linspace(0, len(lost), ERROR_POINTS, dtype=torch.float64).long()
    return torch.cat([lost.new_zeros(1), lost])[dead].float()


def quantile(ascending: Tensor, probability: float) -> float:
    """Interpolated quantile of sorted values."""
    at = probability * (ascending.numel() - 1)
    low = math.floor(at)
    a, b = ascending[low].item(), ascending[math.ceil(at)].item()
    return a + (b - a) * (at - low)


def _selected(values: Tensor, probability: float) -> float:
    """Interpolated quantile of values in any order; faster than sorting them all."""
    pooled = values.flatten().float()
    at = probability * (pooled.numel() - 1)
    low = math.floor(at)
    a = float(pooled.kthvalue(low + 1).values)
    # the next one up, without a second selection
    above = pooled[pooled > a]
    same = int((pooled <= a).sum()) > low + 1
    b = a if same or not above.numel() else float(above.min())
    return a + (b - a) * (at - low)


def _row(ascending: Tensor, probability: float) -> Tensor:
    """Interpolated quantile of every column of (Q, R) sorted values: (R,)."""
    at = probability * (len(ascending) - 1)
    low = math.floor(at)
    return torch.lerp(ascending[low], ascending[math.ceil(at)], at - low)


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


def over_budget(active: float, routers: Sequence[tuple[str, Budgeted]]) -> str:
    """The warning for routers whose shared units alone exceed the budget."""
    path, router = routers[0]
    more = f" (and {len(routers) - 1} more)" if len(routers) > 1 else ""
    return (
        f"active={active:g} is below the shared units of {path}{more}: {router.shared} of"
        f" {router.units} units are used by every token, so {router.shared / router.units:.3g} of"
        " them stay live. Convert with fewer shared units to go lower."
    )
