"""A routed feed-forward layer against its peers and its ideal, at kernel level.

``python benchmarks/kernels.py`` takes the widths 576/1536, 2048/8192 and 4096/11008, 8 and 64
experts, 50 % and 25 % active, 1, 8, 64 and 512 tokens; prints one table and writes
benchmarks/results/kernels.json. ``--quick`` is one width and few rounds. About 30 minutes on two
cores with --compile (torch.compile'd dense layer, weights frozen).

All are timed interleaved (sparsify/timing.py), each on weights of its own layout, in turn over so
many copies that they exceed the last-level cache four times: in a model, the other layers pass
through the cache between two visits. Before anything is timed, all results are
held against the eager module's; what computes something else stops the run.

**The ideal.** A dense layer at T tokens reads B bytes of weights and does T·f operations (f = 2 per
weight); on a machine that reads at β and multiplies at ρ it takes about max(B/β, T·f/ρ). β and ρ
are measured here: those of the best dense backend at one token and at its best T. A routed layer
needs what is live: the union of the tokens' experts has to be read, u·B, and every token's own
pairs multiplied, a·T·f, with a = K/N. So

* where the dense layer is bound by memory (B/β > T·f/ρ: at 1 and 8 tokens), ideal = u · dense(T);
* where it is bound by arithmetic (at 64 and 512 tokens), ideal = a · dense(T),

with dense(T) the *measured* time of the best dense backend at that T, so that what no backend can
reach at that T is not asked of us. ``of ideal`` is ideal over our time, the median over the rounds
of the ratio within a round. Two other readings are printed beside it: ``strict`` asks for
dense(T)·a everywhere, which nothing can reach where tokens use different experts and reading them
is what takes the time; ``roof`` is max(u·B/β, a·T·f/ρ), which may ask for a rate at T tokens that
the best dense backend has only at many more. The router's own work (2·N·D operations a token) is
not in any ideal, but in every routed time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ffn_backends as backends
import torch
from ffn_backends import Call, Layer

from sparsify.cli.machine import facts as machine_facts
from sparsify.timing import Rounds, Spread, Work, copies, enough, interleaved, rotated

RESULTS = Path(__file__).parent / "results" / "kernels.json"
WIDTHS = ((576, 1536), (2048, 8192), (4096, 11008))
TARGETS = {1: 0.90, 8: 0.70, 64: 0.80, 512: 0.85}
OURS, EAGER = "ours", "eager"
PRUNED = ("pruned", "pruned oneDNN")  # a smaller dense layer
DENSE = ("natural", "by neuron", "transposed", "oneDNN", "MKL", "onnx", "compiled")
PEERS = ("expert loop", "hf eager", "hf batched", "hf grouped", "onnx MoE", EAGER, *PRUNED)
GPU_PEERS = ("grouped mm",)  # benchmarks/gpu.py
SPINNING = ("onnx", "onnx MoE")
SPIN = 0.05  # seconds
WORST = 1e-4  # relative error that is another function, not another order of sums
PICKED = 1 << 29  # bytes that hf batched may copy: it gathers whole experts for every token


@dataclasses.dataclass
class Point:
    """One row of the table; times in seconds, live sets counted from the router's own choice."""

    width: int
    hidden: int
    experts: int
    active: float
    tokens: int
    union: float  # share of the experts that some token uses
    times: dict[str, Spread]
    speedup: Spread  # best dense over ours
    dense: str
    errors: dict[str, float]
    note: str
    left_out: dict[str, str]
    wins: bool = False
    lost_to: tuple[str, ...] = ()
    bound: str = ""
    itemsize: int = 4
    of_ideal: Spread | None = None
    of_strict: float = 0.0
    of_roof: float = 0.0

    def judge(self, bandwidth: float, rate: float) -> None:
        """Against the ideal, given bytes a second and operations a second of the best dense."""
        weights = 3 * self.width * self.hidden
        reading, working = self.itemsize * weights / bandwidth, 2 * weights * self.tokens / rate
        self.bound = "memory" if reading >= working else "arithmetic"
        share = self.union if self.bound == "memory" else self.active
        s, ours = self.speedup, self.times[OURS].median
        self.of_ideal = Spread(s.median * share, s.low * share, s.high * share)
        self.of_strict = s.median * self.active
        self.of_roof = max(self.union * reading, self.active * working) / ours
        peers = [name for name in (*PEERS, *GPU_PEERS) if name in self.times]
        if self.note:  # eager stands in for us: it cannot win against itself
            peers.remove(EAGER)
        self.lost_to = tuple(name for name in peers if self.times[name].median <= ours)
        self.wins = not self.lost_to

    def to_dict(self) -> dict[str, Any]:
        target = TARGETS.get(self.tokens)
        judged = target is not None and self.of_ideal is not None
        met = self.of_ideal.median >= target if judged else None
        return {**dataclasses.asdict(self), "target": target, "met": met}


def main(arguments: Sequence[str] | None = None) -> list[Point]:
    given = _options(arguments)
    backends.use_threads(given.threads)
    torch.manual_seed(0)
    started = datetime.datetime.now(datetime.timezone.utc)
    points: list[Point] = []
    with torch.no_grad():
        for width, hidden in given.widths:
            found = list(_measure(width, hidden, given))
            print(f"\n{width}/{hidden}: {judged(found)}")
            points += found
            print(table(found), flush=True)
            _write(given, started, points)
    won, peak = sum(p.wins for p in points), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\nfaster than every peer at {won} of {len(points)} points", end="")
    print(f"; peak memory {peak / 2**20:.1f} GiB")
    return points


def judged(points: Sequence[Point]) -> str:
    """Judge the points of one width by the rates of its best dense backend; says which."""
    weights = 3 * points[0].width * points[0].hidden
    dense = [(p, p.times[p.dense].median) for p in points]
    bandwidth = max(p.itemsize * weights / seconds for p, seconds in dense)
    rate = max(2 * weights * p.tokens / seconds for p, seconds in dense)
    for point in points:
        point.judge(bandwidth, rate)
    return f"dense at its best reads {bandwidth / 1e9:.1f} GB/s, does {rate / 1e9:.0f} GFLOP/s"


def _measure(width: int, hidden: int, given: argparse.Namespace) -> Iterator[Point]:
    first = Layer.random(width, hidden)
    count = 1 if given.quick else _copies(first.bytes, min(given.active))
    layers = [first, *(first.copy() for _ in range(count - 1))]
    compiled = backends.frozen(layers[: copies(first.bytes, _cache())]) if given.compile else None
    for experts in given.experts:
        g = torch.Generator().manual_seed(experts)
        router = torch.randn(experts, width, generator=g)
        for active in given.active:
            print(f"{width}/{hidden}, {experts} experts, {active:.0%}, {count} copies: "
                  "laying out weights", file=sys.stderr, flush=True)  # fmt: skip
            yield from _points(layers, router, active, compiled, given)
            gc.collect()


def _copies(size: int, active: float) -> int:
    """Copies of a layer: no visit may find what an earlier one of the same backend brought.

    All copies together are four times the cache, and within one round a backend sees none twice;
    between its rounds, all others pass through the cache. A single copy does where the least that
    is live of it, read twice in a row (to wake threads, then timed), is four times the cache.
    """
    count = copies(size, _cache())
    return 2 if count == 1 and copies(int(size * active), _cache()) > 1 else count


def _points(
    layers: list[Layer],
    router: torch.Tensor,
    active: float,
    compiled: Call | None,
    given: argparse.Namespace,
) -> Iterator[Point]:
    experts, width = router.shape
    hidden, keep = len(layers[0].gate), round(active * experts)
    modules = [backends.routed(layer, router, active) for layer in layers]
    notes = {backends.lowered(module) for module in modules}
    made: dict[str, list[Call]] = {  # those first that need twice their memory while being made
        "onnx": [backends.onnx_dense(layer) for layer in layers],
        "onnx MoE": [backends.onnx_moe(layer, router, keep) for layer in layers],
        OURS: list(modules),
        EAGER: [backends.routed(layer, router, active) for layer in layers],
        "natural": [backends.natural(layer) for layer in layers],
        "by neuron": [backends.by_neuron(layer) for layer in layers],
        "transposed": [backends.transposed(layer) for layer in layers],
        "pruned": [backends.by_neuron(layer.head(active)) for layer in layers],
        "expert loop": [backends.expert_loop(layer, router, keep) for layer in layers],
    }
    for name in ("eager", "batched", "grouped"):
        way = name if name == "eager" else f"{name}_mm"
        made[f"hf {name}"] = [backends.huggingface(layer, router, keep, way) for layer in layers]
    for tokens in given.tokens:
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
        made["oneDNN"] = [backends.onednn(layer, tokens) for layer in layers]
        made["MKL"] = [backends.mkl(layer, tokens) for layer in layers]
        made["pruned oneDNN"] = [backends.onednn(layer.head(active), tokens) for layer in layers]
        left_out = {} if compiled else {"compiled": "--compile times it"}
        picked = tokens * keep * 3 * (hidden // experts) * width * 4
        if picked > PICKED:
            left_out["hf batched"] = f"it would copy {picked / 2**30:.1f} GiB of weights"
        calls = {name: bound(f, x) for name, f in made.items() if name not in left_out}
        if compiled is not None:
            calls["compiled"] = [lambda x=x: compiled(x)]
        errors = _errors(calls)
        rounds = given.rounds or (15 if tokens <= 8 else 9)
        found = interleaved(_work(calls, layers, OURS), rounds)
        used = torch.nn.functional.linear(x, router).topk(keep, dim=-1).indices.unique()
        dense = found.best([name for name in DENSE if name in calls])
        yield Point(
            width, hidden, experts, active, tokens, len(used) / experts,
            {name: found.time(name) for name in calls}, found.speedup(OURS, dense), dense,
            errors, "; ".join(sorted(notes - {""})), left_out,
        )  # fmt: skip
        _say(found, tokens, dense)
        del made["oneDNN"], made["MKL"], made["pruned oneDNN"]


def bound(functions: Sequence[Call], x: torch.Tensor) -> list[Callable[[], Any]]:
    """Calls without arguments, one per copy."""
    return [lambda f=f: f(x) for f in functions]  # type: ignore[misc]


def _work(
    calls: dict[str, list[Callable[[], Any]]], layers: list[Layer], like: str
) -> dict[str, Work]:
    """Each backend's visits of its copies; one untimed visit wakes its thread pool.

    ONNX Runtime's threads go on spinning for 40 ms after a call, on the cores that the next backend
    needs: that one waits until they sleep. Calls of a round go to copies that this backend has not
    visited for long; a compiled stack visits all of its own in one call.
    """
    most = max(len(layers) - 1, 1)
    work = {}
    busy = [0.0]  # until when another's threads may spin

    def wake(call: Callable[[], Any]) -> None:
        time.sleep(max(busy[0] - time.perf_counter(), 0.0))
        call()

    def marked(call: Callable[[], Any]) -> None:
        call()
        busy[0] = time.perf_counter() + SPIN

    for name, each in calls.items():
        call = rotated(each)
        if name in SPINNING:
            call = functools.partial(marked, call)
        units = min(len(layers), copies(layers[0].bytes, _cache())) if name == "compiled" else 1
        times = 1 if name == "compiled" else enough(call, most=most)
        work[name] = Work(call, functools.partial(wake, call), times, units)
    return work


def _errors(calls: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Largest error of the first copy's result, relative to the largest value expected."""
    expected = {True: calls["natural"][0](), False: calls[EAGER][0]()}
    found = {}
    for name, each in calls.items():
        if name in PRUNED:
            continue  # another function: the same neurons for every token
        result = each[0]()
        result = result[0] if isinstance(result, tuple) else result
        wanted = expected[name in DENSE]
        found[name] = float((result - wanted).abs().max() / wanted.abs().max())
        if not found[name] < WORST:
            raise SystemExit(f"error: {name} computes another function: error {found[name]:.2g}")
    return found


def table(points: Sequence[Point]) -> str:
    """One line per point."""
    head = (f"{'experts':>7}{'active':>7}{'tokens':>7}{'union':>7}  {'dense best':<11}{'ms':>9}"
            f"{'ours ms':>9}{'speedup':>8}{'p20-p80':>12}{'of ideal':>9}{'target':>7}{'strict':>7}"
            f"{'roof':>6}{'error':>8}  best peer, and who is faster than us")  # fmt: skip
    lines = [head]
    for p in points:
        peer = min(
            (n for n in (*PEERS, *GPU_PEERS) if n in p.times), key=lambda n: p.times[n].median
        )
        ours, s = p.times[OURS].median, p.speedup
        target = TARGETS.get(p.tokens)
        verdict = "wins" if p.wins else "loses to " + ", ".join(p.lost_to)
        lines.append(
            f"{p.experts:>7}{p.active:>7.0%}{p.tokens:>7}{p.union:>7.0%}  {p.dense:<11}"
            f"{p.times[p.dense].median * 1e3:>9.3f}{ours * 1e3:>9.3f}{s.median:>8.2f}"
            f"{f'{s.low:.2f}-{s.high:.2f}':>12}{p.of_ideal.median:>9.2f}"
            f"{'' if target is None else f'{target:.2f}':>7}{p.of_strict:>7.2f}{p.of_roof:>6.2f}"
            f"{p.errors[OURS]:>8.0e}  {peer} {p.times[peer].median / ours:.2f}x; {verdict}"
        )
    notes = {p.note for p in points if p.note}
    notes |= {f"{name} left out: {why}" for p in points for name, why in p.left_out.items()}
    return "\n".join([*lines, *sorted(notes)])


def _say(found: Rounds, tokens: int, dense: str) -> None:
    times = sorted((found.time(name).median, name) for name in found.seconds)
    shown = ", ".join(f"{name} {t * 1e3:.3f}" for t, name in times)
    print(
        f"  {tokens} tokens, ms ({dense} is the best dense): {shown}", file=sys.stderr, flush=True
    )


def _write(given: argparse.Namespace, started: datetime.datetime, points: list[Point]) -> None:
    content = {
        "date": started.isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "threads": given.threads,
        "cache_bytes": _cache(),
        "quick": given.quick,
        "points": [point.to_dict() for point in points],
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(content, indent=1) + "\n")


def _cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * factor)
    return max(sizes[1:] or sizes)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def many(kind: Any) -> Callable[[str], list[Any]]:
        return lambda text: [kind(word) for word in text.split(",")]

    def pair(text: str) -> tuple[int, int]:
        width, hidden = text.split("/")
        return int(width), int(hidden)

    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--widths", type=many(pair), help="576/1536,...")
    options.add_argument("--experts", type=many(int))
    options.add_argument("--active", type=many(float), default=[0.5, 0.25])
    options.add_argument("--tokens", type=many(int), default=[1, 8, 64, 512])
    options.add_argument("--rounds", type=int, default=0, help="default: 15 up to 8 tokens, else 9")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--compile", action="store_true", help="time torch.compile too")
    options.add_argument("--quick", action="store_true", help="576/1536, 8 experts, few rounds")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args(arguments)
    given.widths = given.widths or list(WIDTHS[:1] if given.quick else WIDTHS)
    given.experts = given.experts or ([8] if given.quick else [8, 64])
    if given.quick:
        given.rounds = given.rounds or 2
        if given.output == RESULTS:
            given.output = RESULTS.with_name("kernels-quick.json")
    return given


if __name__ == "__main__":
    main()
