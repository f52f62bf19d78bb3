"""The active budget as a dial: one number for the model, spread over its layers.

Routers that count keep whole units, so rounding is carried from layer to layer (error diffusion)
and the mean over the layers meets the budget. Routers that cut (and fixed orders) with an error
table get the budgets whose errors add up to the least (one Lagrange multiplier for all), so layers
that can spare more do; others all get the same. Where units differ in cost, budgets are shares of
cost.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.budget import Budgeted, check_active, over_budget
from sparsify.text_paths import match_path


def routers(
    model: nn.Module, at: str | None = None, pass_name: str | None = None
) -> list[tuple[str, Budgeted]]:
    """(path, router) in model order; ``at`` is a glob of region paths, as in pipeline texts."""
    return [
        (path, router)
        for path, name, router in _owned(model)
        if (pass_name is None or name == pass_name)
        and (at is None or any(match_path(at, prefix) for prefix in _prefixes(path)))
    ]


def _owned(model: nn.Module) -> list[tuple[str, str, Budgeted]]:
    """(path, name of the pass that made it, router); a router inside a module is of its pass."""
    found = []
    owner: dict[str, str] = {}
    for path, module in model.named_modules():
        name = getattr(module, "pass_name", "") or owner.get(path.rpartition(".")[0], "")
        owner[path] = name
        if isinstance(module, Budgeted) and not module.led:
            found.append((path, name, module))
    return found


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def set_active(
    model: nn.Module,
    active: float,
    at: str | None = None,
    pass_name: str | None = None,
    *,
    warn: bool = True,
) -> dict[str, float]:
    """Turn the dial.

    Args:
        active: fraction of units that a token uses on average, 0 < active <= 1; 1 = dense limit.
        at: only routers under these paths; pass_name: only those of one pass.
        warn: say so where shared units alone exceed the budget.

    Returns:
        path -> the budget that router got.

    Raises:
        BadInput: ``active`` is out of range, or no router is selected.
    """
    check_active(active)
    chosen = routers(model, at, pass_name)
    if not chosen:
        where = f" at '{at}'" if at else ""
        raise BadInput(
            f"nothing to set active on{where}", help="model.realised() lists the routers"
        )
    turn(model, chosen, active, warn=warn)
    return {path: router.active for path, router in chosen}


def turn(
    model: nn.Module, chosen: Sequence[tuple[str, Budgeted]], active: float, *, warn: bool = True
) -> None:
    """Spread the budget ``active`` over these (path, router) of ``model``; the others stay."""
    over = [(path, r) for path, r in chosen if r.clamped(active)]
    if over and warn:
        warnings.warn(over_budget(active, over), stacklevel=3)
    names = {id(router): name for _, name, router in _owned(model)}
    by_pass: dict[str, list[Budgeted]] = {}
    for _, router in chosen:
        by_pass.setdefault(names[id(router)], []).append(router)
    for _, members in sorted(by_pass.items()):
        spread(members, active)
    _tell_company(model)


def spread(members: Sequence[Budgeted], active: float) -> None:
    """Give routers of one pass the budgets whose mean is ``active``; other passes are not told."""

    def kind(router: Budgeted) -> tuple[str, bool]:
        return (str(router.selector), router.errors is not None)

    for (_, errors), group in itertools.groupby(sorted(members, key=kind), key=kind):
        alike = list(group)
        rule = alike[0].selector
        if rule.spreads and errors and len(alike) > 1 and active < 1:
            _allocate(alike, active)
        elif rule.mean:
            for router in alike:
                router.set_active(active, warn=False)
        else:
            _diffuse(alike, active)


def set_each(model: nn.Module, values: Mapping[Budgeted, float]) -> None:
    """Set every router to its own budget: nothing is spread, each one rounds for itself."""
    for router, active in values.items():
        router.set_active(active, warn=False)
    _tell_company(model)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[list[Budgeted]]:
    """All routers; whatever is done to their dials inside, they are turned back after."""
    members = [router for _, router in routers(model)]
    before = [router.setting for router in members]
    try:
        yield members
    finally:
        for router, setting in zip(members, before, strict=True):
            router.setting = setting


def _tell_company(model: nn.Module) -> None:
    """Tell every router how far those of other passes are turned down, relative to its own."""
    by_pass: dict[str, list[Budgeted]] = {}
    for _, name, router in _owned(model):
        by_pass.setdefault(name, []).append(router)
    for mine in by_pass.values():
        others = [router for group in by_pass.values() if group is not mine for router in group]
        own = _off(mine)
        theirs = _off(others) if others else own
        company = min(theirs / own, 1.0) if own > 0 else 1.0
        for router in mine:
            router.setting = router.active, router.k_exact, company


def _off(members: Sequence[Budgeted]) -> float:
    return sum(1 - router.active for router in members) / len(members)


def _diffuse(members: Sequence[Budgeted], active: float) -> None:
    """Whole units per layer whose running sum stays within half a step of the budget's."""
    owed = 0.0
    for router in members:
        owed += router.wanted(active)
        k = min(int(router.selector.whole(owed, 0 if router.shared else 1)), router.routed)
        owed -= k
        router.set_active(active, k_exact=k, warn=False)


def _allocate(members: Sequence[Budgeted], active: float) -> None:
    """Budgets with the least total error at the mean budget ``active``.

    Each router minimizes ``error + price * cost of live units`` over its table; the price that
    spends the budget is found by bisection, and what whole table steps leave is shared in
    proportion.
    """
    tables = []
    for router in members:
        assert router.errors is not None  # routers without are a kind of their own
        dead = torch.linspace(0, 1, router.errors.numel(), dtype=torch.float64)
        cost = (router.shared + router.routed * (1 - dead)) * router.unit_cost
        tables.append((router.errors.double().cpu(), cost))
    wanted = active * sum(router.units * router.unit_cost for router in members)

    def at(price: float) -> list[float]:
        return [float(cost[(errors + price * cost).argmin()]) for errors, cost in tables]

    top = max(float(errors.max()) for errors, _ in tables) + 1e-30
    top /= min(router.unit_cost for router in members)
    low, high = 1e-30 * top, 1e6 * top  # from everything live to as little as possible
    for _ in range(60):
        price = math.sqrt(low * high)
        low, high = (price, high) if sum(at(price)) > wanted else (low, price)
    least, most = at(high), at(low)
    spare = sum(most) - sum(least)
    part = min(max((wanted - sum(least)) / spare, 0.0), 1.0) if spare > 0 else 0.0
    for router, a, b in zip(members, least, most, strict=True):
        share = (a + part * (b - a)) / (router.units * router.unit_cost)
        router.set_active(min(max(share, 1e-6), 1.0), warn=False)
