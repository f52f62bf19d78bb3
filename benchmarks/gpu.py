"""The Triton kernel of the routed feed-forward layer on a GPU, against dense and peers.

``python benchmarks/gpu.py`` needs a CUDA device and says so where there is none. Shapes, budgets,
token counts, ideal and table are those of benchmarks/kernels.py; weights are bfloat16 (--dtype).
Dense: torch, and torch.compile. Peers: torch's grouped matmul over sorted tokens, transformers'
experts (eager, batched, grouped), our eager dispatch, and a dense layer pruned to the same budget.
A timed run is many calls between two device synchronisations, on copies of the weights that exceed
the L2 cache four times. Writes benchmarks/results/gpu.json.

The kernel was written, checked in Triton's interpreter and compiled for sm_80, sm_90, sm_100 and
gfx942 on machines without a GPU; this script is how it is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ffn_backends as backends
import kernels
import torch
from ffn_backends import Call, Layer
from kernels import EAGER, OURS, Point

from sparsify.cli.machine import facts as machine_facts
from sparsify.timing import Work, copies, interleaved, rotated

RESULTS = Path(__file__).parent / "results" / "gpu.json"
CALLS = 20  # between two synchronisations
DENSE = ("natural", "by neuron", "compiled")
WORST = {"bfloat16": 4e-2, "float16": 1e-2, "float32": 1e-4}  # of the largest value, per dtype


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dtype", choices=tuple(WORST), default="bfloat16")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--quick", action="store_true", help="576/1536 only")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    device = torch.cuda.get_device_properties(0)
    cache = int(device.L2_cache_size)
    points: list[Point] = []
    for width, hidden in kernels.WIDTHS[: 1 if given.quick else None]:
        found = list(measure(
            width, hidden, "cuda", given.dtype, given.rounds, cache, compiled=True
        ))  # fmt: skip
        print(f"\n{width}/{hidden} on {device.name}: {kernels.judged(found)}")
        print(kernels.table(found), flush=True)
        points += found
        given.output.parent.mkdir(exist_ok=True)
        content = {"date": now, "gpu": device.name, "dtype": given.dtype,
                   "machine": machine_facts(), "points": [p.to_dict() for p in points]}  # fmt: skip
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


@torch.no_grad()
def measure(
    width: int,
    hidden: int,
    device: str,
    dtype: str,
    rounds: int,
    cache: int,
    *,
    experts: Sequence[int] = (8, 64),
    budgets: Sequence[float] = (0.5, 0.25),
    tokens: Sequence[int] = (1, 8, 64, 512),
    compiled: bool = False,
) -> Iterator[Point]:
    """All points of one width; ``device`` may be ``cpu``, to see that this runs."""
    kind = getattr(torch, dtype)
    first = Layer.random(width, hidden).to(device, kind)
    layers = [first, *(first.copy() for _ in range(copies(first.bytes, cache) - 1))]
    dense = {"natural": [backends.natural(layer) for layer in layers],
             "by neuron": [backends.by_neuron(layer) for layer in layers]}  # fmt: skip
    if compiled:
        ffn = torch.compile(_ffn)  # one graph whose weights are inputs, not one per copy
        dense["compiled"] = [
            lambda x, w=layer: ffn(x, w.gate, w.up, w.down_natural) for layer in layers
        ]
    for count in experts:
        g = torch.Generator().manual_seed(count)
        router = torch.randn(count, width, generator=g).to(device, kind)
        for active in budgets:
            keep = round(active * count)
            made, note = _routed(layers, router, active, keep)
            for number in tokens:
                g = torch.Generator().manual_seed(number)
                x = torch.randn(number, width, generator=g).to(device, kind)
                yield _point(x, router, active, dense | made, note, rounds, (hidden, keep))


def _ffn(x: Any, gate: Any, up: Any, down: Any) -> Any:
    linear = torch.nn.functional.linear
    return linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)


def _routed(
    layers: list[Layer], router: torch.Tensor, active: float, keep: int
) -> tuple[dict[str, list[Call]], str]:
    ours = [backends.routed(layer, router, active) for layer in layers]
    notes = sorted({backends.lowered(module) for module in ours} - {""})
    made: dict[str, list[Call]] = {
        OURS: list(ours),
        EAGER: [backends.routed(layer, router, active) for layer in layers],
        "grouped mm": [backends.grouped(layer, router, keep) for layer in layers],
        "pruned": [backends.by_neuron(layer.head(active)) for layer in layers],
    }
    for way in ("eager", "batched_mm", "grouped_mm"):
        name = f"hf {way.removesuffix('_mm')}"
        made[name] = [backends.huggingface(layer, router, keep, way) for layer in layers]
    return made, "; ".join(notes)


def _point(
    x: torch.Tensor,
    router: torch.Tensor,
    active: float,
    made: dict[str, list[Call]],
    note: str,
    rounds: int,
    sizes: tuple[int, int],
) -> Point:
    hidden, keep = sizes
    (tokens, width), count = x.shape, len(router)
    left_out: dict[str, str] = {}
    picked = tokens * keep * 3 * (hidden // count) * width * x.element_size()
    if picked > kernels.PICKED * 8:
        left_out["hf batched"] = f"it would copy {picked / 2**30:.1f} GiB of weights"
    calls = {name: kernels.bound(f, x) for name, f in made.items() if name not in left_out}
    errors = _errors(calls, str(x.dtype).removeprefix("torch."))
    module = made[OURS][0]
    if getattr(module, "kernel", None) is not None and module.lowered(x) is None:  # type: ignore[attr-defined]
        note = "the kernel declined: eager ran"
    work = {name: Work(*_many(each)) for name, each in calls.items()}
    found = interleaved(work, rounds, clock=_clock(x.device))
    used = torch.nn.functional.linear(x, router).topk(keep, dim=-1).indices.unique()
    best = found.best([name for name in DENSE if name in calls])
    return Point(
        width, hidden, count, active, tokens, len(used) / count,
        {name: found.time(name) for name in calls}, found.speedup(OURS, best), best, errors, note,
        left_out, itemsize=x.element_size(),
    )  # fmt: skip


def _many(each: list[Callable[[], Any]]) -> tuple[Any, Any, int]:
    call = rotated(each)
    return call, call, CALLS


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds once the device has done all it was given."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _errors(calls: dict[str, list[Callable[[], Any]]], dtype: str) -> dict[str, float]:
    """As in kernels.py: relative to the largest value expected."""
    found = {}
    for name, each in calls.items():
        if name == "pruned":
            continue
        wanted = calls["natural" if name in DENSE else EAGER][0]().float()
        found[name] = float((each[0]().float() - wanted).abs().max() / wanted.abs().max())
        if not found[name] < WORST[dtype]:
            raise SystemExit(f"error: {name} computes another function: error {found[name]:.2g}")
    return found


if __name__ == "__main__":
    sys.exit(main())
