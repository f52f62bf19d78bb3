"""Healing of a routed SmolLM2: how much of the gap to dense minutes of training close.

``python benchmarks/heal.py --train routers`` (or ``lora``) compiles SmolLM2-135M with
``ffn-moe{active=0.5}``, distils the dense model into it on calibration docstrings, and measures
perplexity on held-out docstrings before and after, at the same really live share: training shifts
how many experts score above a threshold, so the healed model is also measured with its dial turned
to where as much is live as before, and no more. Writes benchmarks/results/heal-<train>.json with
the curves. About 20 CPU minutes each.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import sparsify
from sparsify import api
from sparsify.healing import heal
from sparsify.models import load_model
from sparsify.runtime.model import SparseModel

RESULTS = Path(__file__).parent / "results"
PIPELINE = "ffn-moe{active=0.5}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--train", choices=("routers", "lora", "all"), default="routers")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--every", type=int, default=25)
    options.add_argument("--rate", type=float, default=1.0)
    options.add_argument("--tokens", type=int, default=4096, help="of the held-out text")
    options.add_argument("--model", help="a folder with the compiled model, to save two minutes")
    options.add_argument("--checkpoint", help="folder for checkpoints")
    options.add_argument("--resume", action="store_true")
    given = options.parse_args()
    model = sparsify.load(given.model) if given.model else _compiled()
    before = _measured(model, 0.5, given.tokens)
    print("before", json.dumps(before), flush=True)
    start = time.process_time()
    healed = heal(
        model, "docstrings", train=given.train, active=0.5, steps=given.steps, every=given.every,
        rate=given.rate, checkpoint=given.checkpoint, resume=given.resume, seed=1,
        progress=_shown(),
    )  # fmt: skip
    spent = time.process_time() - start
    print(healed.text_table(), flush=True)
    after = _measured(model, 0.5, given.tokens)
    same = _matched(model, before, after, given.tokens)
    gap = before["perplexity"] - before["dense"]
    closed = (before["perplexity"] - same["perplexity"]) / gap
    print("after", json.dumps(after), "\nat the live share of before", json.dumps(same))
    print(f"{closed:.0%} of the gap closed in {spent / 60:.1f} CPU minutes")
    found = {
        "model": "smollm2", "pipeline": PIPELINE, "machine": api.machine(),
        "measured": "docstrings, held out", "tokens": given.tokens,
        "before": before, "after": after, "after_at_live_share_of_before": same,
        "gap_closed": closed, "cpu_minutes": spent / 60, "healing": _short(healed.to_dict()),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"heal-{given.train}.json").write_text(json.dumps(found, indent=1) + "\n")


def _compiled() -> SparseModel:
    loaded: Any = load_model("smollm2")
    return api.compile(loaded.model, PIPELINE, calibration="docstrings", tokenizer=loaded.tokenizer)


def _measured(model: SparseModel, active: float, tokens: int) -> dict[str, float]:
    """Perplexity and live share on held-out text; the dial is left at ``active``."""
    found = api.evaluate(model, "docstrings", active=[active], calibration=None, tokens=tokens)
    dense, routed = found.quality.rows[0], found.quality.rows[1]
    model.set_active(active)
    return {
        "active": active, "live": float(routed.realised or 1.0),
        "perplexity": routed.perplexity, "dense": dense.perplexity,
    }  # fmt: skip


def _short(healing: dict[str, Any]) -> dict[str, Any]:
    """Without each router's row of loads: the sums over routers say enough here."""
    for row in (*healing["evaluations"], healing["start"], healing["final"]):
        row.pop("routers", None)
    return healing


def _matched(
    model: SparseModel, before: dict[str, float], after: dict[str, float], tokens: int
) -> dict[str, float]:
    """Measured where the live share is that of ``before``, at most 0.2 points below it."""
    tried, active = [after], after["active"]
    for _ in range(4):
        live = tried[-1]["live"]
        if before["live"] - 0.002 <= live <= before["live"]:
            break
        active += before["live"] - 0.001 - live
        tried.append(_measured(model, active, tokens))
    below = [row for row in tried if row["live"] <= before["live"]]
    return max(below, key=lambda row: row["live"])


def _shown() -> Any:
    begin = time.process_time()

    def show(event: str, done: int, total: int) -> None:
        if event == "heal" and done % 5 == 0:
            print(f"step {done}/{total}  {time.process_time() - begin:.0f} CPU s", flush=True)

    return show


if __name__ == "__main__":
    main()
