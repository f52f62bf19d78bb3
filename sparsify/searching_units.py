"""What a search turns: routers in units, the levels of a unit, and what a level costs.

A unit holds the routers that one pass made for the projections that read one input (query, key and
value, say), or for one layer. A level is the mean budget of a unit; inside, its routers share it
as the dial would (:mod:`sparsify.runtime.dial`), rounded to what a pipeline text says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from sparsify.costs import routed_cost
from sparsify.pipeline import Placed
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.cost import Cost
from sparsify.runtime.dial import spread

STEP, FINE = 0.05, 0.02  # between the levels that are solved for; where there are few units
FEW = 24
LEAST = 0.1  # the lowest level
Setting = Mapping[Budgeted, float]


@dataclasses.dataclass(frozen=True)
class Level:
    """One budget of a unit.

    Attributes:
        active: its mean; values: of each router.
        cost: of the modules that the unit selects for, the rest as it is.
        shape: what is lost, on a scale of this unit's own (zero when all is live).
    """

    active: float
    values: tuple[float, ...]
    cost: Cost
    shape: float


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Routers that are turned together.

    Attributes:
        placed: what they were made for.
        start: the first node of the graph that they change.
        nodes: all nodes whose modules they select for.
        levels: from all live down.
    """

    placed: tuple[Placed, ...]
    start: fx.Node
    nodes: tuple[fx.Node, ...]
    levels: tuple[Level, ...] = ()

    @property
    def routers(self) -> tuple[Budgeted, ...]:
        """In the order of a level's values."""
        return tuple(r for p in self.placed for r in p.routers)

    @property
    def pass_name(self) -> str:
        """The pass that made them."""
        return self.placed[0].pass_name

    @property
    def regions(self) -> tuple[str, ...]:
        """The paths of their regions."""
        return tuple(p.region for p in self.placed)

    def setting(self, level: int) -> dict[Budgeted, float]:
        """The budgets of a level."""
        return dict(zip(self.routers, self.levels[level].values, strict=True))

    def nearest(self, active: float) -> int:
        """The level (below all live) that is closest to a budget."""
        below = range(1, len(self.levels))
        return min(below, key=lambda n: abs(self.levels[n].active - active))


def units_of(gm: fx.GraphModule, placed: Sequence[Placed], *, context: int) -> list[Unit]:
    """All units that have a level which saves something, in the order of the graph.

    The dials are left as they were.
    """
    nodes = _nodes(gm)
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    grouped: dict[tuple[int, str, str], list[Placed]] = {}
    for each in placed:
        mine = [node for r in each.routers for node in nodes.get(r, ())]
        if mine:
            first = min(mine, key=lambda n: order[n])
            reads = first.args[0] if first.args else first
            key = (each.stage, str(reads), each.region.rpartition(".")[0])
            grouped.setdefault(key, []).append(each)
    found = []
    for members in grouped.values():
        routers = [r for p in members for r in p.routers]
        mine = sorted({n for r in routers for n in nodes.get(r, ())}, key=lambda n: order[n])
        unit = Unit(tuple(members), mine[0], tuple(mine))
        levels = _levels(gm, unit, context, STEP if len(grouped) > FEW else FINE)
        if _saves(levels):
            found.append(dataclasses.replace(unit, levels=levels))
    return sorted(found, key=lambda u: order[u.start])


def _saves(levels: Sequence[Level]) -> bool:
    """Whether any level costs less than all live."""
    full = levels[0].cost
    return any(
        level.cost.flops < full.flops
        or level.cost.bytes + level.cost.cache < full.bytes + full.cache
        for level in levels
    )


def _nodes(gm: fx.GraphModule) -> dict[Budgeted, list[fx.Node]]:
    """Router -> the nodes whose modules hold it, or get its selection."""
    found: dict[Budgeted, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        users = []
        if isinstance(module, Budgeted):
            users = [user for user in node.users if user.op == "call_module"]
        routers = (m for m in module.modules() if isinstance(m, Budgeted))
        for router in (r for r in routers if not r.led):
            found.setdefault(router, []).extend([node, *users])
    return found


def _levels(gm: fx.GraphModule, unit: Unit, context: int, step: float) -> tuple[Level, ...]:
    routers = unit.routers
    before = [router.setting for router in routers]
    found: list[Level] = []
    for number in range(round((1 - LEAST) / step) + 1):
        active = round(1 - number * step, 4)
        if number and all(router.clamped(active) for router in routers):
            break
        spread(routers, active)
        values = tuple(written(router) for router in routers)
        if found and values == found[-1].values:
            continue
        for router, value in zip(routers, values, strict=True):
            router.set_active(value, warn=False)
        cost = routed_cost(gm, unit.nodes, context=context)
        shape = sum(lost(r, v) for r, v in zip(routers, values, strict=True))
        found.append(Level(active, values, cost, shape))
    for router, setting in zip(routers, before, strict=True):
        router.setting = setting
    return tuple(found)


def written(router: Budgeted) -> float:
    """The router's budget as a pipeline text says it; all live is all live."""
    if router.budget >= router.routed:
        return 1.0
    if router.selector.mean:
        return min(max(round(router.active, 2), 0.01), 0.99)
    return round((router.shared + router.budget) / router.units, 3)


def lost(router: Budgeted, active: float) -> float:
    """What a budget loses: off its error table, or, without one, the square of what is dead."""
    dead = 1 - router.wanted(active) / max(router.routed, 1)
    if router.errors is None:
        return dead**2 * router.units * router.unit_cost
    table = router.errors
    at = dead * (len(table) - 1)
    low, high = math.floor(at), math.ceil(at)
    a, b = float(table[low]), float(table[high])
    return a + (b - a) * (at - low)


def everything(units: Iterable[Unit]) -> list[Budgeted]:
    """The routers of all units."""
    return [router for unit in units for router in unit.routers]
