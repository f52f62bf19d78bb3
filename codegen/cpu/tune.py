"""Which way a routed feed-forward layer runs fastest on this machine: measured, kept, looked up.

For a kind of layer (sizes, dtype, threads) every way is timed once at a few numbers of tokens, with
all experts live and with a quarter; between those, time is linear in the live share and a power of
the number of tokens. The dense way computes every expert for every token. The table is kept on disk
(:mod:`sparsify.codegen.store`) under the machine's key, so a layer is measured once per machine.
"""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from sparsify.codegen.cpu.ffn import Choose, FfnKernel, Way
from sparsify.codegen.machine import machine
from sparsify.codegen.store import store
from sparsify.runtime.ffn import RoutedFFN

TOKENS = (1, 4, 16, 64, 256)
FEW = 64  # most tokens that the few-token kernel is tried with
SHARES = (0.25, 1.0)
VERSION = 4  # of the kernels: a new one is measured anew
SECONDS = 0.3  # spent on one way at one number of tokens, about

Times = dict[int, tuple[float, float]]  # tokens -> seconds at SHARES
Table = dict[Way, Times]
W = TypeVar("W", bound=str)


def key_of(module: RoutedFFN, int8: bool = False) -> str:
    """What a table is kept under."""
    gated = "gated" if module.gate is not None else "plain"
    thin = "-thin" if module.inside is not None else ""
    dtype = "int8" if int8 else str(module.up.dtype).removeprefix("torch.")
    sizes = "x".join(str(n) for n in module.up.shape)
    return f"ffn-{VERSION}-{sizes}-{gated}{thin}-{dtype}-{here()}"


def here() -> str:
    """What every timing depends on, in a key: the threads and the machine."""
    return f"{torch.get_num_threads()}t-{machine().key}"


def kept_table(key: str, make: Callable[[], Mapping[W, Times]]) -> dict[W, Times]:
    """The times that are kept under ``key``, else measured by ``make`` and kept."""
    kept = store().json(key, make)
    return {way: {int(t): (a, b) for t, (a, b) in times.items()} for way, times in kept.items()}


def table_of(modules: Sequence[RoutedFFN], kernels: Sequence[FfnKernel]) -> Table:
    """The table of layers of one kind, from the store or measured on these with their kernels."""
    key = key_of(modules[0], kernels[0].int8)
    return kept_table(key, lambda: measure(modules, kernels))


def measure(modules: Sequence[RoutedFFN], kernels: Sequence[FfnKernel]) -> Table:
    """Time every way; ``modules`` take turns, so that their weights come from memory as in use."""
    table: Table = {"few": {}, "prefill": {}, "dense": {}}
    like = modules[0].up
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, modules[0].width).to(like.dtype)
            for way in table:
                if way == "few" and tokens > FEW:
                    continue
                if way == "prefill" and (tokens == 1 or modules[0].inside is not None):
                    continue
                times = [timed(_call(kernels, way, modules, x, s)) for s in SHARES]
                table[way][tokens] = (times[0], times[1])
    return table


def _call(
    kernels: Sequence[FfnKernel],
    way: Way,
    modules: Sequence[RoutedFFN],
    x: torch.Tensor,
    share: float,
) -> Callable[[int], Any]:
    """The nth call: the nth layer, that share of its experts live, each token's its own."""
    experts = modules[0].experts
    keep = max(round(share * experts), 1)
    best = torch.rand(len(x), experts).topk(keep, dim=1).indices
    select = torch.zeros(len(x), experts).scatter(1, best, 1.0).to(x.dtype)
    if way == "dense":
        return lambda n: modules[n % len(modules)]._masked(x, select, None)
    count = len(modules)
    return lambda n: kernels[n % count].compute(way, modules[n % count], x, select)


def timed(call: Callable[[int], Any]) -> float:
    """Median seconds of the calls with 1, 2, 3 and so on."""
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    number = 0
    call(number)
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 30):
        number += 1
        start = time.perf_counter()
        call(number)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def seconds(table: Mapping[W, Times], way: W, tokens: int, active: float) -> float:
    """Expected time; infinite where the way was not measured."""
    times = table[way]
    known = sorted(times)
    if not known or tokens < known[0] or (way == "few" and tokens > known[-1]):
        return math.inf

    def at(count: int) -> float:
        low, high = times[count]
        part = (active - SHARES[0]) / (SHARES[1] - SHARES[0])
        return max(low + part * (high - low), low / 8)

    after = min(bisect.bisect_left(known, tokens), len(known) - 1)
    before = max(after - 1, 0)
    if known[after] == tokens or after == before:
        return at(known[after])
    a, b = known[before], known[after]
    slope = math.log(at(b) / at(a)) / math.log(b / a)
    return at(a) * math.pow(tokens / a, slope)


def best(table: Table, tokens: int, active: float) -> Way:
    """The fastest way."""
    return min(table, key=lambda way: seconds(table, way, tokens, active))


def chooser(table: Table) -> Choose:
    """:func:`best`, remembered."""
    known: dict[tuple[int, float], Way] = {}

    def choose(tokens: int, active: float) -> Way:
        at = (tokens, active)
        found = known.get(at)
        if found is None:
            found = known[at] = best(table, tokens, active)
        return found

    return choose


def told(table: Table, active: float = 0.5) -> str:
    """The ways and what they gain over the dense one, for the remark."""
    parts = []
    for tokens in TOKENS:
        way = best(table, tokens, active)
        gain = seconds(table, "dense", tokens, active) / seconds(table, way, tokens, active)
        parts.append(f"{tokens} {way}" + ("" if way == "dense" else f" {gain:.1f}x"))
    return f"C kernel; tokens and way, against dense, at {active:.0%} active: {', '.join(parts)}"
