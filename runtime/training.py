"""How a routed model runs while it trains: every unit computed, thresholds that follow the scores.

The selection is hard, so its gradient is *straight-through* (Bengio et al., arXiv:1308.3432). A
router by itself passes it to the scores of live units only. Where every unit is computed anyway
(``dispatch="masked"``), dead units can be asked too what they would have changed, as in dense
backpropagation for MoE (arXiv:2504.12463): under :func:`masked` a unit's weight is

    1[live] + g - stop(g),   g = sigmoid((score - cut) / spread)

with the cut between live and dead and the spread of the layer's scores, so that units near the cut
learn most, whatever unit the scores are in. Values are those of the hard selection, bit for bit.

:class:`Thresholds` keeps the budget while scores drift: an absolute threshold fitted before the
training would let ever more or ever fewer units through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.runtime.budget import Budgeted
from sparsify.runtime.dial import kept, routers, set_active
from sparsify.runtime.router import Router
from sparsify.runtime.rule import Selection
from sparsify.runtime.spec import Dispatch, RoutedModule

FOLLOWED = 2**17  # scores of a batch that a threshold follows, about: whole tokens, evenly spread
SETTLED_AT = (0.25, 0.5, 0.75)  # budgets that thresholds are settled at, as when compiling


@contextlib.contextmanager
def masked(model: nn.Module) -> Iterator[None]:
    """Inside, modules that can compute every unit and mask the dead ones; faster to train.

    Gradients also reach the scores of dead units, where the router has unit weights.
    """
    before: list[tuple[RoutedModule, Dispatch]] = []
    wrapped: list[Router] = []
    for module in model.modules():
        if not isinstance(module, RoutedModule):
            continue
        before.append((module, module.dispatch))
        module.dispatch = "masked"
        inner = getattr(module, "router", None)
        if type(inner) is not Router or "forward" in vars(inner):
            continue
        if inner.unit_weights and module.computes_masked:
            inner.forward = _straight_through(inner)  # type: ignore[method-assign]
            wrapped.append(inner)
    try:
        yield
    finally:
        for module, dispatch in before:
            module.dispatch = dispatch
        for router in wrapped:
            del router.forward


def _straight_through(router: Router) -> Callable[..., Tensor]:
    """``router.forward`` whose gradient reaches dead units too."""
    usual = router.forward

    def forward(x: Tensor, scores: Tensor | None = None) -> Tensor:
        if router.all_live or not torch.is_grad_enabled():
            return usual(x) if scores is None else usual(x, scores)
        scores = router.scores(x) if scores is None else scores
        live = router.live(scores)
        hard = usual(x.detach(), scores.detach())  # values, order, and what is kept for losses
        if router.last is not None:
            router.last = (scores, router.last[1])
        soft = torch.sigmoid(_centred(scores, live)).to(x.dtype)
        soft = soft - soft.detach()
        if router.shared:
            soft = nn.functional.pad(soft, (router.shared, 0))
        if router.order is not None:
            soft = torch.zeros_like(soft).index_copy(-1, router.order, soft)
        return hard + soft

    return forward


def _centred(scores: Tensor, live: Tensor) -> Tensor:
    """Scores (..., R) from the cut, in standard deviations of the layer's scores."""
    known = scores.detach()
    least = known.masked_fill(~live, torch.inf).amin(-1, keepdim=True)
    best = known.masked_fill(live, -torch.inf).amax(-1, keepdim=True)
    cut = (least.nan_to_num(posinf=0.0) + best.nan_to_num(neginf=0.0)) / 2
    cut = torch.where(least.isinf(), best, torch.where(best.isinf(), least, cut))
    return (scores - cut) / known.std().clamp_min(torch.finfo(known.dtype).tiny)


# ---------------------------------------------------------------------------- thresholds


class Thresholds:
    """Inside ``with``, thresholds follow their routers' scores, so that budgets hold.

    Each forward that can train measures the score above which the budget's share of the batch
    lies; the threshold moves towards it by ``rate`` (a running mean over about 1/rate batches).
    Forwards without gradients use the thresholds and leave them alone.

    Args:
        model: its routers with ``rule="threshold"`` follow; others keep their budgets by counting.
        rate: of the running mean, 0 < rate <= 1.

    Attributes:
        shifts: float64 (routers,), what is added to every router's own threshold.
    """

    def __init__(self, model: nn.Module, rate: float = 0.3) -> None:
        self.members = [
            r
            for r in _budgeted(model)
            if r.selector.mean and not r.selector.per_unit and r.quantiles is not None
        ]
        self.rate = rate
        self.shifts = torch.zeros(len(self.members), dtype=torch.float64)

    def __enter__(self) -> Thresholds:
        for index, router in enumerate(self.members):
            router.live = self._cutting(index, router)  # type: ignore[method-assign]
            if isinstance(router, Router):
                router.select = self._selecting(index, router)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for router in self.members:
            vars(router).pop("select", None)
            vars(router).pop("live", None)
            router.drift = 0.0
            router.changed()

    def _selecting(self, index: int, router: Router) -> Callable[..., Selection]:
        usual = router.select

        def select(x: Tensor, scores: Tensor | None = None) -> Selection:
            scores = router.scores(x) if scores is None else scores
            self._follow(index, router, scores)
            return usual(x, scores)

        return select

    def _cutting(self, index: int, router: Budgeted) -> Callable[..., Tensor]:
        usual = router.live

        def live(scores: Tensor, extra: Tensor | None = None) -> Tensor:
            if isinstance(router, Router):
                self._put(index, router)  # it follows where it selects
            else:
                self._follow(index, router, scores)
            return usual(scores, extra)

        return live

    def _follow(self, index: int, router: Budgeted, scores: Tensor) -> None:
        """Move the threshold towards what the budget wants of these scores."""
        share = router.budget / router.routed
        if torch.is_grad_enabled() and 0 < share < 1:
            step = max(scores.numel() // FOLLOWED, 1)
            keys = router.keys(scores.detach()).flatten(0, -2)[::step].flatten().float()
            at = min(round((1 - share) * len(keys)), len(keys) - 1)
            cut = float(keys.kthvalue(max(at, 1)).values)
            wanted = cut - (float(router.threshold) - router.drift)
            self.shifts[index] += self.rate * (wanted - self.shifts[index])
        self._put(index, router)

    def _put(self, index: int, router: Budgeted) -> None:
        if router.drift != float(self.shifts[index]):
            router.drift = float(self.shifts[index])
            router.changed()


def _budgeted(model: nn.Module) -> list[Budgeted]:
    """All that select, also those that the dial passes over because they follow another."""
    return [m for m in model.modules() if isinstance(m, Budgeted)]


def resettle(model: nn.Module, run: Callable[[], Any]) -> None:
    """Fit the thresholds of a trained model anew.

    First the tables of scores, at the dense limit, then what to add to thresholds, layer by layer
    on what the sparse layers before give, at each of ``SETTLED_AT`` and at the present budget, as
    :mod:`sparsify.settle` does when compiling.

    Args:
        model: its budgets are as before after it.
        run: runs the model on text like what it will see, thousands of tokens in one forward.
    """
    mine = [r for r in _budgeted(model) if r.rule == "threshold" and r.quantiles is not None]
    if not mine:
        return
    passes = dict.fromkeys(m.pass_name for m in model.modules() if isinstance(m, RoutedModule))
    names = [name for name in passes if routers(model, pass_name=name)]
    runs: list[str | None] = [*names, *([None] if len(names) > 1 else [])]
    with kept(model), torch.no_grad():
        present = [(r, r.setting) for _, r in routers(model)]
        set_active(model, 1.0)
        with _before(mine, lambda router, x: router.calibrate(x)):
            run()
        for alone in runs:
            ours = {id(r) for _, r in routers(model, pass_name=alone)}
            settings = [[(r, s) for r, s in present if id(r) in ours]]
            for budget in SETTLED_AT:
                set_active(model, budget, pass_name=alone, warn=False)
                settings.append([(r, r.setting) for r, _ in settings[0]])
            if settings[0] in settings[1:]:
                settings.pop(0)
            for setting in settings:
                set_active(model, 1.0)
                for router, value in setting:
                    router.setting = value
                with _before(mine, _settle_alone if alone else _settle):
                    run()


def _settle(router: Budgeted, x: Tensor) -> None:
    router.settle(router.scores(x))


def _settle_alone(router: Budgeted, x: Tensor) -> None:
    router.settle(router.scores(x), alone=True)


@contextlib.contextmanager
def _before(members: list[Budgeted], act: Callable[[Budgeted, Tensor], None]) -> Iterator[None]:
    """Inside, ``act(router, x)`` is called just before a router routes x."""

    def acting(router: Budgeted) -> Callable[..., Tensor]:
        usual = router.forward

        def forward(x: Tensor, *scores: Tensor) -> Tensor:
            act(router, x)
            result: Tensor = usual(x, *scores)
            return result

        return forward

    try:
        for router in members:
            router.forward = acting(router)
        yield
    finally:
        for router in members:
            vars(router).pop("forward", None)
