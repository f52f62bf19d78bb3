"""Whether a routed projection's C kernel or the dense product is faster here: measured once, kept.

Where most of a small projection is live, skipping the rest saves less than the kernel costs beside
a matrix product of torch's. For every kind of projection (sizes, dtype, threads) both ways are
timed at one to eight tokens, with a quarter live and with everything live, as
:mod:`sparsify.codegen.cpu.tune` does for feed-forward layers; from that follows, for each number of
tokens, the live share from which on the dense way is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.codegen.cpu.call import FEW, Cuts, Way
from sparsify.codegen.cpu.tune import SHARES, Times, here, kept_table, seconds, timed

TOKENS = (1, 2, 4, FEW)
VERSION = 1  # of the kernels: a new one is measured anew
MARGIN = 1.1  # how much faster the other way must be: less may be noise
_STEPS = 100  # shares that are looked at
Table = dict[Way, Times]


class Tuned(Protocol):
    """A kernel that can be timed both ways.

    Attributes:
        cuts: the live share from which on it runs the dense way, by number of tokens.
    """

    cuts: Cuts

    @property
    def key(self) -> str:
        """Kind, sizes and dtype."""

    @property
    def dense(self) -> bool:
        """Whether there is a dense way with the same result."""

    def trial(self, module: Any, way: Way, tokens: int, share: float) -> Callable[[], Tensor]:
        """A call with that share live."""


def tune(modules: Sequence[Any], kernels: Sequence[Tuned]) -> str:
    """Set the cuts of ``kernels``, which are alike; what was found, for the remark."""
    if not kernels[0].dense:
        return ""
    cuts = cuts_of(table_of(modules, kernels))
    for kernel in kernels:
        kernel.cuts = cuts
    return told(cuts)


def table_of(modules: Sequence[Any], kernels: Sequence[Tuned]) -> Table:
    """The table of projections of one kind, from the store or measured on these."""
    return kept_table(f"{kernels[0].key}-{VERSION}-{here()}", lambda: measure(modules, kernels))


def measure(modules: Sequence[Any], kernels: Sequence[Tuned]) -> Table:
    """Time every way; ``modules`` take turns, so that their weights come from memory as in use."""
    table: Table = {"few": {}, "dense": {}, "whole": {}}
    pairs = list(zip(modules, kernels, strict=True))
    with torch.no_grad():
        for way, times in table.items():
            for tokens in TOKENS:
                found = []
                for share in SHARES:
                    calls = [kernel.trial(module, way, tokens, share) for module, kernel in pairs]
                    found.append(timed(_turns(calls)))
                times[tokens] = (found[0], found[1])
    return table


def _turns(calls: Sequence[Callable[[], Tensor]]) -> Callable[[int], Tensor]:
    """The nth call."""
    return lambda n: calls[n % len(calls)]()


def cuts_of(table: Table) -> Cuts:
    """From which share on the dense way is faster, for 0 to 8 tokens."""
    return (math.inf, *(_cut(table, tokens) for tokens in range(1, FEW + 1)))


def _cut(table: Table, tokens: int) -> float:
    """Times of the kernel grow with the share, those of dense do not: look from the top down."""
    if seconds(table, "few", tokens, 1.0) < MARGIN * seconds(table, "whole", tokens, 1.0):
        return math.inf
    cut = 1.0
    for step in range(_STEPS - 1, 0, -1):
        share = step / _STEPS
        if seconds(table, "few", tokens, share) < MARGIN * seconds(table, "dense", tokens, share):
            break
        cut = share
    return cut


def told(cuts: Cuts) -> str:
    """The cuts as words, for the remark."""
    parts = [
        f"{tokens} from {cuts[tokens]:.0%}" for tokens in TOKENS if not math.isinf(cuts[tokens])
    ]
    return f"dense where that is faster: tokens and live share {', '.join(parts)}" if parts else ""
