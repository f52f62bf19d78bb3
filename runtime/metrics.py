"""What a router does on a text: load, entropy, live ratio, and how local its choices are.

Local routing consistency (Liang et al., arXiv:2505.16056) says how well a cache of few units could
serve a run of tokens. Two measures:

* Segment routing best performance: the best F1 of a router that must decide once for every segment
  of m tokens which units are live, against the real decisions, over all (overlapping) segments. The
  best is to take a unit for a segment where it is live in at least alpha of its tokens; with f the
  number of those tokens, ``SRP(m) = max over alpha of 2 sum(f, f >= alpha) / (m |f >= alpha| +
  sum(f))`` (their eq. 6, for all units of a layer together). 1: units stay live for m tokens.
* Segment cache best hit rate: the hit rate of a cache of a given size that, when a token needs
  units that are not there, loads them in the place of those least used in the next m tokens
  (section 2.3). Sizes are multiples rho of the units a token uses on average.

Shared units are always live: they are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.dial import routers
from sparsify.runtime.router import Router

SEGMENT = 16  # tokens; the paper's middle length
CACHE = 2.0  # cache size over units in use: where the paper finds most models balanced


@dataclasses.dataclass(frozen=True)
class RouterFacts:
    """Of one router on a text.

    Attributes:
        tokens: counted.
        live: (R,) share of the tokens that use each routed unit.
        entropy: of the units' shares of the load, relative to its largest, log R: 1 = even.
        srp: segment routing best performance; size: units its segment router takes, over those
            the router takes; NaN where no sequence is long enough.
        sch: segment cache best hit rate.
    """

    tokens: int
    live: tuple[float, ...]
    entropy: float
    srp: float
    size: float
    sch: float

    @property
    def live_ratio(self) -> float:
        """Live share of all (token, routed unit) pairs."""
        return sum(self.live) / len(self.live)

    @property
    def imbalance(self) -> float:
        """The largest unit's load over the mean load: 1 = even."""
        mean = self.live_ratio
        return max(self.live) / mean if mean else math.nan


def facts(masks: list[Tensor], *, segment: int = SEGMENT, cache: float = CACHE) -> RouterFacts:
    """Of one router's selections.

    Args:
        masks: bool (T, R) per sequence, nonzero = live.
        segment: m; cache: rho.
    """
    if not masks or not sum(len(m) for m in masks):
        raise BadInput("no token was routed: nothing to measure")
    live = torch.cat([m != 0 for m in masks]).double().mean(0)
    srp, size = segment_routing(masks, segment)
    return RouterFacts(
        tokens=sum(len(m) for m in masks),
        live=tuple(live.tolist()),
        entropy=entropy(live),
        srp=srp,
        size=size,
        sch=segment_cache(masks, segment, cache),
    )


def entropy(load: Tensor) -> float:
    """load (R,) of any scale -> its entropy over log R; 1 for a single unit, NaN for no load."""
    total = float(load.sum())
    if not total:
        return math.nan
    if len(load) < 2:
        return 1.0
    share = load.double() / total
    return float(-torch.special.xlogy(share, share).sum()) / math.log(len(load))


def segment_routing(masks: list[Tensor], segment: int = SEGMENT) -> tuple[float, float]:
    """(SRP, size ratio) of a layer's units; NaN where no sequence has ``segment`` tokens.

    Args:
        masks: (T, R) per sequence, nonzero = live.
    """
    counts = torch.zeros(segment + 1, dtype=torch.float64)  # segments by live tokens
    for mask in masks:
        if len(mask) < segment or not mask.shape[1]:
            continue
        ahead = torch.nn.functional.pad((mask != 0).long().cumsum(0), (0, 0, 1, 0))
        live = ahead[segment:] - ahead[:-segment]  # (T - m + 1, R)
        counts += torch.bincount(live.flatten().cpu(), minlength=segment + 1).double()
    number = torch.arange(segment + 1, dtype=torch.float64)
    total = float((number * counts).sum())
    if not float(counts.sum()):
        return math.nan, math.nan
    if not total:
        return 0.0, math.nan
    taken = counts.flip(0).cumsum(0).flip(0)  # segments with at least alpha live tokens
    hits = (number * counts).flip(0).cumsum(0).flip(0)
    score = 2 * hits / (segment * taken + total)
    at = int(score[1:].argmax()) + 1  # alpha = 0 takes everything: never better than alpha = 1
    return float(score[at]), float(segment * taken[at]) / total


def segment_cache(masks: list[Tensor], segment: int = SEGMENT, cache: float = CACHE) -> float:
    """SCH: hits over needs of the oracle segment cache, sequence by sequence from an empty cache.

    A cache never holds fewer units than one token uses; of units equally little used in the next
    ``segment`` tokens, the higher number goes.

    Args:
        masks: (T, R) per sequence, nonzero = live.
    """
    hits = needs = 0
    tokens = sum(len(m) for m in masks)
    used = sum(int((m != 0).sum()) for m in masks)
    if not tokens or not used:
        return math.nan
    size = math.floor(cache * used / tokens + 0.5)
    for mask in masks:
        live = (mask != 0).cpu()
        ahead = torch.nn.functional.pad(live.long().cumsum(0), (0, 0, 1, 0))
        held: set[int] = set()
        for t, row in enumerate(live):
            wanted = set(row.nonzero().flatten().tolist())
            hits += len(held & wanted)
            needs += len(wanted)
            held |= wanted
            over = len(held) - max(size, len(wanted))
            if over > 0:
                soon = (ahead[min(t + 1 + segment, len(live))] - ahead[t + 1]).tolist()
                idle = sorted(held - wanted, key=lambda unit: (soon[unit], -unit))
                held -= set(idle[:over])
    return hits / needs


# ---------------------------------------------------------------------------- while it trains


class Loads:
    """Inside ``with``, counts how many tokens use each routed unit of every router of a model.

    Cheaper than :func:`facts`, and counts add up over several ``with``: for a training loop.

    Attributes:
        tokens: path -> tokens that the router has seen.
        used: path -> float64 (R,), tokens that used each unit, as the routed module numbers them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.members = [
            (path, r) for path, r in routers(model) if isinstance(r, Router) and r.routed
        ]
        self.tokens = {path: 0 for path, _ in self.members}
        self.used = {p: torch.zeros(r.routed, dtype=torch.float64) for p, r in self.members}
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Loads:
        for path, router in self.members:
            self._hooks.callback(router.register_forward_hook(self._count(path, router)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _count(self, path: str, router: Router) -> Any:
        order = range(router.units) if router.order is None else router.order.tolist()
        numbers = sorted(list(order)[router.shared :])

        def hook(module: nn.Module, inputs: Any, select: Tensor) -> None:
            rows = select.detach().reshape(-1, router.units)[:, numbers]
            self.tokens[path] += len(rows)
            self.used[path] += (rows != 0).sum(0).double().cpu()

        return hook

    def balance(self) -> dict[str, Any]:
        """How even the load is; empty where nothing was counted.

        Returns:
            ``entropy`` (1 = even) and ``imbalance`` (largest over mean load), means over routers;
            ``dead_units``: routed units that no token used, over all routers; ``routers``: path ->
            ``load`` (share of tokens per unit, 4 digits), ``entropy``, ``imbalance``, ``dead``.
        """
        rows = {}
        for path, used in self.used.items():
            if not self.tokens[path] or not float(used.sum()):
                continue
            load = used / self.tokens[path]
            per_unit: dict[str, Any] = {
                "load": [round(share, 4) for share in load.tolist()],
                "entropy": entropy(load),
                "imbalance": float(load.max() / load.mean()),
                "dead": int((used == 0).sum()),
            }
            rows[path] = per_unit
        if not rows:
            return {}
        return {
            "entropy": sum(row["entropy"] for row in rows.values()) / len(rows),
            "imbalance": sum(row["imbalance"] for row in rows.values()) / len(rows),
            "dead_units": sum(row["dead"] for row in rows.values()),
            "routers": rows,
        }
