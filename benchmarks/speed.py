"""Time of routed SmolLM2-135M beside the dense backends and the ideal, interleaved in one run.

``python benchmarks/speed.py`` times prefill (512 tokens) and decode (one token after 128) of the
transformers model, of torch.compile on it (with --compile; minutes), and of the routed model at
several budgets. Every round times each of them once, in turn; ratios are of medians, to the
transformers model. *ideal* is the ratio of operations (prefill) or of weight bytes (decode) that
the report counts. Writes benchmarks/results/speed.json.

Today the routed model runs on plain PyTorch calls, one group of calls per live expert: it is not
expected to reach the ideal before its operations are lowered to kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsify import api
from sparsify.costs import facts
from sparsify.models import load_model

RESULTS = Path(__file__).parent / "results" / "speed.json"
PREFILL, CONTEXT = 512, 128
PIPELINES = ("ffn-moe{experts=8}", "ffn-moe")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--active", default="1,0.75,0.5")
    options.add_argument("--compile", action="store_true", help="time torch.compile too")
    given = options.parse_args()
    budgets = [float(a) for a in given.active.split(",")]
    torch.manual_seed(0)
    loaded: Any = load_model("smollm2")
    dense = {"transformers": loaded.model}
    if given.compile:
        dense["torch.compile"] = torch.compile(loaded.model, dynamic=True)
    ids = torch.randint(100, 40000, (1, PREFILL))
    work: dict[str, dict[str, Callable[[], Any]]] = {"prefill": {}, "decode": {}}
    ideal: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    for name, model in dense.items():
        work["prefill"][name] = lambda model=model: model(ids, use_cache=False)
        work["decode"][name] = _decoder(model, ids)
    for pipeline in PIPELINES:
        sparse = api.compile(
            loaded.model, pipeline, calibration="docstrings", tokenizer=loaded.tokenizer,
            verify="off",
        )  # fmt: skip
        before = sparse.report.dense
        for active in budgets:
            name = f"{pipeline} at {active:.0%}"
            sparse.set_active(active)
            after = facts(sparse.graph, (), context=PREFILL // 2)
            ideal["prefill"][name] = after.flops_per_token / before.flops_per_token
            ideal["decode"][name] = after.bytes_per_token / before.bytes_per_token
            turn = lambda sparse=sparse, active=active: sparse.set_active(active)  # noqa: E731
            work["prefill"][name] = _after(turn, lambda m=sparse: m(ids, use_cache=False))
            work["decode"][name] = _after(turn, _decoder(sparse, ids))
    results = []
    with torch.no_grad():
        for phase, callables in work.items():
            times = _interleaved(callables, given.rounds)
            base = times["transformers"]
            print(f"\n{phase:34}{'ms':>9}{'ratio':>9}{'ideal':>9}")
            for name, seconds in times.items():
                wanted = ideal[phase].get(name)
                shown = f"{wanted:9.2f}" if wanted is not None else ""
                print(f"{name:34}{seconds * 1e3:9.1f}{seconds / base:9.2f}{shown}", flush=True)
                results.append({"phase": phase, "model": name, "seconds": seconds,
                                "ratio": seconds / base, "ideal": wanted})  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": api.machine(), "rows": results}, indent=1) + "\n")


def _decoder(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """One step with a cache of CONTEXT tokens, the same for every call."""
    cache: list[Any] = []

    def step() -> Any:
        if not cache:
            cache.append(model(ids[:, :CONTEXT], use_cache=True).past_key_values)
        past = cache[0]
        out = model(ids[:, CONTEXT : CONTEXT + 1], past_key_values=past, use_cache=True)
        past.crop(CONTEXT)
        return out

    return step


def _after(first: Callable[[], Any], then: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> Any:
        first()
        return then

    both.prepares = True  # type: ignore[attr-defined]
    return both


def _interleaved(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each; every round runs all of them once, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            ready = call() if getattr(call, "prepares", False) else call
            ready()  # caches hold this model's weights, as in a run of its own
            start = time.perf_counter()
            ready()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


if __name__ == "__main__":
    main()
