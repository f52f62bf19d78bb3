"""What really ran: live shares and operations of the routed matrices, from the counters.

Operations are two per multiply-add of the rewritten matrices; routers and what stands in for dead
units are included. Attention scores are not: no baseline here saves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import nn

from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.counters import Counter, counters, reset
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.spec import RoutedModule
from sparsify.static_layers import layers_of
from sparsify.static_pruning import prunable


def dense_operations(module: nn.Module) -> float | None:
    """Of a token in the dense matrices that a routed module holds; None where that is not known."""
    if isinstance(module, RoutedFFN) and not module.copies:
        return 2.0 * (2 + (module.gate is not None)) * module.up.numel()
    if isinstance(module, RoutedLinear):
        return 2.0 * module.columns.numel()
    if isinstance(module, RoutedRows):
        others = 0 if module.others is None else module.others.numel()
        return 2.0 * (module.blocks.numel() + others)
    if isinstance(module, RoutedColumns):
        return 2.0 * module.blocks.numel()
    return 0.0 if isinstance(module, RoutedAttend | Budgeted) else None


def operations(module: nn.Module, work: Counter, inside: Counter | None = None) -> float:
    """That a module of a known kind did; ``inside``: the neurons' counter of a routed layer."""
    live = work.units_live
    stands_in = live < work.units_total
    if isinstance(module, RoutedFFN):
        size = module.hidden * module.width
        rows = float(live * module.hidden if inside is None else inside.units_live)
        total = live * size * (1 + (module.gate is not None)) + rows * module.width
        units = 0
        if stands_in:
            units += 0 if module.dropped is None else module.experts
            units += 0 if module.slopes is None else module.router.routed
        if inside is not None and inside.units_live < inside.units_total:
            units += 0 if module.offset is None else module.experts
        router = 0.5 * module.router.cost().flops if stands_in else 0.0
        return 2.0 * (total + work.tokens * (units * module.width + router))
    if isinstance(module, RoutedLinear):
        return 2.0 * live * module.columns.shape[1]
    if isinstance(module, RoutedRows):
        others = 0 if module.others is None else module.others.numel()
        return 2.0 * (live * module.blocks[0].numel() + work.tokens * others)
    if isinstance(module, RoutedColumns):
        spare = 0 if module.dropped is None or not stands_in else module.dropped.numel()
        return 2.0 * (live * module.blocks[0].numel() + work.tokens * spare)
    return 0.0


def parts(model: nn.Module, pass_name: str | None = None) -> Iterator[tuple[str, RoutedModule]]:
    """(path, routed module that stands by itself), of one pass or all; not those inside others."""
    inside = ""
    for path, module in model.named_modules():
        if not isinstance(module, RoutedModule) or (inside and path.startswith(inside)):
            continue
        if pass_name in (None, module.pass_name):
            inside = f"{path}."
            yield path, module


@dataclasses.dataclass
class Tally:
    """Sums of the counters over many runs of a routed model.

    Args:
        model: whose counters are read; pass_name: of one pass only.
    """

    model: nn.Module
    pass_name: str | None = None
    done: float = 0.0
    dense: float = 0.0

    def __post_init__(self) -> None:
        whole: Mapping[str, nn.Module] = layers_of(self.model)
        units: Mapping[str, nn.Module] = {p: u.module for p, u in prunable(self.model).items()}
        mine = [
            {p for p, m in kind.items() if self.pass_name in (None, getattr(m, "pass_name", ""))}
            for kind in (whole, units)
        ]
        self._paths = mine[0] or mine[1]
        self._live: dict[str, tuple[int, int]] = {}
        self._parts = dict(parts(self.model, self.pass_name))
        known = [dense_operations(m) for m in self._parts.values()]
        self.known = bool(sum(n or 0.0 for n in known)) and None not in known
        self._alone = [m for m in self._parts.values() if isinstance(m, Budgeted)]

    def reset(self) -> None:
        """Before a run."""
        reset(self.model)

    def add(self) -> None:
        """After a run."""
        tokens = 0
        for path, counter in counters(self.model):
            if path in self._paths:
                live, units = self._live.get(path, (0, 0))
                self._live[path] = (live + counter.units_live, units + counter.units_total)
            tokens = max(tokens, counter.tokens)
        if not self.known:
            return
        for module in self._parts.values():
            inside = getattr(module, "inside", None)
            work = None if inside is None else inside.counter
            self.done += operations(module, module.counter, work)
            self.dense += (dense_operations(module) or 0.0) * module.counter.tokens
        self.done += tokens * sum(router.cost().flops for router in self._alone)

    @property
    def shares(self) -> dict[str, float]:
        """Path -> live share of the units of a module."""
        return {path: live / units for path, (live, units) in self._live.items() if units}

    @property
    def flops(self) -> float | None:
        """Operations over those of the dense matrices; None where they are not known."""
        return self.done / self.dense if self.known and self.dense else None
