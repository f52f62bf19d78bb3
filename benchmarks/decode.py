"""SmolLM2-135M end to end: decoded tokens a second, routed against dense, over the dial.

``python benchmarks/decode.py`` decodes one token after 128 with three pipelines (half of the
feed-forward layers' experts; half of all linears' inputs; both), at several budgets, eager and
lowered, beside four dense models: transformers' own, the captured graph nothing was done to, the
same with our kernels for its products, and torch.compile's (with --compile; minutes). The models of
one pipeline are timed interleaved (sparsify/timing.py), each step on another token of held-out
text, caches of the same length. The ideal is Amdahl's: the time of the dense projections, measured
in the same rounds, shrinks to the share of bytes that is left of them (sparsify/bench.py).
``speedup`` is over the *fastest* dense model, so what our kernels gain without routing is no gain
of routing; the verdicts say what is gained over transformers' model too.

Prints the tables and the verdicts, and writes benchmarks/results/decode.json. ``--quick`` takes a
tiny model and few rounds. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify import api, bench_setup
from sparsify.bench import COMPILED, DENSE, DENSE_LOWERED, LOWERED, PARTS, Bench
from sparsify.bench_table import Benchmark, BenchRow, Regime
from sparsify.capture import capture
from sparsify.cli.machine import facts as machine_facts
from sparsify.hf import wrap
from sparsify.models import load_model
from sparsify.runtime.model import SparseModel

RESULTS = Path(__file__).parent / "results" / "decode.json"
GRAPH = "dense, captured graph"
PIPELINES = ("ffn-moe", "hidden-route", "ffn-moe,hidden-route")
TARGET, AT = 0.85, 0.5  # of the ideal, at this budget


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    given = _options(arguments)
    torch.set_num_threads(given.threads)
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    loaded: Any = load_model(given.model)
    captured = capture(loaded.model, loaded.example)
    graph = wrap(SparseModel.of(captured), loaded.model)
    dense = {DENSE: loaded.model, GRAPH: graph}
    ours = bench_setup.lowered_dense(captured, loaded.model)
    if ours is not None:
        dense[DENSE_LOWERED] = ours
    if given.compile:
        dense[COMPILED] = torch.compile(loaded.model, dynamic=False)
    tables: list[dict[str, Any]] = []
    for pipeline in given.pipelines:
        sparse = api.compile(
            captured, pipeline, tokenizer=loaded.tokenizer, verify="off",
            calibration="docstrings" if loaded.tokenizer is not None else None,
            context=given.context,
        )  # fmt: skip
        notes = [] if given.compile else ["torch.compile was not timed (--compile)"]
        work = Bench(sparse, dense, bench_setup.ids_of(sparse, 0), notes=notes)
        rows = tuple(work.rows([Regime(1, 1, given.context)], given.active, given.rounds))
        found = Benchmark(
            given.model, pipeline, rows, given.rounds, tuple(notes), started, api.machine()
        )
        print(found.text(width=120))
        verdicts = judge(rows)
        print("\n".join(verdicts), flush=True)
        tables.append({**found.to_dict(), "verdicts": verdicts})
        content = {"date": started, "machine": machine_facts(), "threads": given.threads}
        given.output.parent.mkdir(exist_ok=True)
        given.output.write_text(json.dumps({**content, "tables": tables}, indent=1) + "\n")
        del sparse, work
    return tables


def judge(rows: Sequence[BenchRow]) -> list[str]:
    """Whether the lowered model is ever slower than dense, and how near it is to the ideal."""
    lowered = [row for row in rows if row.model == LOWERED]
    if not lowered:
        return ["not lowered: nothing to judge"]
    said = []
    slower = [row for row in lowered if row.speedup.median < 1]
    for row in slower:
        s = row.speedup
        noise = "; within the noise" if s.high >= 1 else ""
        said.append(f"SLOWER than dense at {row.active:.0%}: {s.median:.3f} ({s.low:.3f} to "
                    f"{s.high:.3f} of the rounds' middle{noise})")  # fmt: skip
    if not slower:
        least = min(lowered, key=lambda row: row.speedup.median)
        least_text = f"at least {least.speedup.median:.3f} times as fast (at {least.active:.0%})"
        said.append(f"never slower than the fastest dense model: {least_text}")
    for row in lowered:
        if row.active == AT and row.of_ideal is not None:
            met = "reaches" if row.of_ideal >= TARGET else "MISSES"
            said.append(f"{met} {TARGET:.0%} of the ideal at {AT:.0%}: {row.of_ideal:.1%}, "
                        f"{row.speedup.median:.2f} times of {row.ideal:.2f} possible")  # fmt: skip
    said += over_transformers(rows, lowered)
    return said


def over_transformers(rows: Sequence[BenchRow], lowered: Sequence[BenchRow]) -> list[str]:
    """The same against the model as its users run it, with torch's products."""
    seconds = {row.model: row.seconds.median for row in rows if row.active is None}
    base = next((row.model for row in rows if row.base), DENSE)
    if DENSE not in seconds or PARTS[0] not in seconds:
        return []
    theirs = seconds[DENSE]
    gains = [f"{theirs / row.seconds.median:.2f} at {row.active:.0%}" for row in lowered]
    said = [f"times as fast as transformers' dense model: {', '.join(gains)}"]
    for row in lowered:
        if row.active == AT and row.ideal is not None and base in seconds:
            part = min(seconds[PARTS[base == DENSE_LOWERED]] / seconds[base], 1.0)
            saved = (1 - 1 / row.ideal) / part  # share of the projections' bytes that is not read
            ideal = 1 / (1 - saved * min(seconds[PARTS[0]] / theirs, 1.0))
            gain = theirs / row.seconds.median
            met = "reaches" if gain / ideal >= TARGET else "MISSES"
            said.append(
                f"{met} {TARGET:.0%} of the ideal over transformers' dense model at {AT:.0%}: "
                f"{gain / ideal:.1%}, {gain:.2f} times of {ideal:.2f} possible"
            )
    return said


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", default="smollm2")
    options.add_argument("--pipelines", type=lambda text: text.split("|"), default=PIPELINES,
                         help="separated by |")  # fmt: skip
    options.add_argument("--active", type=lambda text: [float(a) for a in text.split(",")],
                         default=[1.0, 0.9, 0.75, 0.5, 0.25])  # fmt: skip
    options.add_argument("--context", type=int, default=128)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--compile", action="store_true", help="time torch.compile too")
    options.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args(arguments)
    if given.quick:
        given.model, given.rounds, given.context, given.active = "zoo:llama", 2, 8, [1.0, 0.5]
        if given.output == RESULTS:
            given.output = RESULTS.with_name("decode-quick.json")
    return given


if __name__ == "__main__":
    main()
