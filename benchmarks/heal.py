"""Healing of a routed SmolLM2: how much of the gap to dense minutes of training close.

    python benchmarks/heal.py --train routers --steps 100 --every 50
    python benchmarks/heal.py --pipeline 'hidden-route{at=*.mlp.* active=0.5}' --fitted mixed \
        --train routed --half --steps 150

compiles SmolLM2-135M with the pipeline, fitted on the calibration half of ``--fitted``, distils the
dense model into it on that text (``--text`` for another), and measures perplexity on the held-out
half of every kind in ``--kinds``: dense, before, and after. Training shifts how much scores above a
threshold and how much that is depends on the text, so for every kind the dials of both models are
turned until the operations counted on a sample of the measured sequences are just below the budget,
and as many in both. *Dense* is the model as it was before anything.
Writes benchmarks/results/heal-<pass>-<train>.json with the curves, and again after every kind.

CPU minutes are process time of the healing: reading, training, measuring on the way and the final
fit of thresholds; compiling before it and the table after it are not in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsify
from sparsify import api
from sparsify.bootstrap import Bootstrap
from sparsify.corpus import token_blocks
from sparsify.counted import Tally
from sparsify.evaluate import Score, compare
from sparsify.healing import heal
from sparsify.models import load_model
from sparsify.runtime.model import SparseModel
from sparsify.saved import budget
from sparsify.static_pruning import all_live

RESULTS = Path(__file__).parent / "results"
LENGTH = 256
MATCHED = 2048  # tokens of each kind that operations are counted on, to turn the dials
MARGIN = 0.002  # below the budget: the rest of the text differs
NEAR = 0.002  # that the matched share may lie below the wanted one


def main(arguments: Sequence[str] | None = None) -> None:
    given = _given(arguments)
    model = sparsify.load(given.model) if given.model else _compiled(given)
    model.set_active(given.active)
    before = copy.deepcopy(model)
    start = time.process_time()
    healed = heal(
        model, given.text or given.fitted, train=given.train, active=given.active,
        steps=given.steps, minutes=given.minutes, batch=given.batch, length=LENGTH,
        every=given.every, rate=given.rate, rank=given.rank, mse=given.mse, half=given.half,
        patience=given.patience, checkpoint=given.checkpoint, resume=given.resume, seed=1,
        progress=_shown(),
    )  # fmt: skip
    # what processes before this one spent is known to the checkpoint only
    spent = healed.cpu_seconds if given.resume else time.process_time() - start
    print(healed.text_table(), flush=True)
    if given.save:
        model.save(given.save, force=True)
    texts = {kind: _held_out(model, kind, given.tokens) for kind in given.kinds.split(",")}
    name = f"heal-{given.pipeline.partition('{')[0]}-{given.train}.json"
    output = given.output or RESULTS / name
    found: dict[str, Any] = {
        "model": "smollm2", "pipeline": model.pipeline, "fitted": given.fitted,
        "machine": api.machine(), "half": given.half, "cpu_minutes": spent / 60,
        "budget": given.active, "measured": [], "healing": _short(healed.to_dict()),
    }  # fmt: skip
    for kind, rows in texts.items():
        share = _turned(before, rows, given.active, given.active - MARGIN)
        _turned(model, rows, given.active, share)
        row = {"text": f"{kind}, held out", **_measured(before, model, rows)}
        found["measured"].append(row)
        print(kind, json.dumps(row), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{spent / 60:.1f} CPU minutes of healing; {output}")


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pipeline", default="ffn-moe{active=0.5}")
    options.add_argument("--active", type=float, default=0.5, help="budget to heal at")
    options.add_argument("--fitted", default="docstrings", help="text to compile with")
    options.add_argument("--text", help="to heal on; default: that of --fitted")
    options.add_argument("--kinds", default="docstrings", help="of held-out text, commas between")
    options.add_argument("--train", choices=("routers", "lora", "routed", "all"), default="routers")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--minutes", type=float, help="of wall time, at most")
    options.add_argument("--batch", type=int, default=2, help=f"sequences of {LENGTH} a step")
    options.add_argument("--every", type=int, default=25)
    options.add_argument("--patience", type=int, default=3)
    options.add_argument("--rate", type=float, default=1.0)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--mse", type=float, default=1.0)
    options.add_argument("--half", action="store_true", help="train in bfloat16")
    options.add_argument("--tokens", type=int, default=4096, help="of each held-out text")
    options.add_argument("--model", help="a folder with the compiled model, to save minutes")
    options.add_argument("--quick", action="store_true", help="a tiny random model, for tests")
    options.add_argument("--checkpoint", help="folder for checkpoints")
    options.add_argument("--resume", action="store_true")
    options.add_argument("--save", help="folder for the healed model")
    options.add_argument("--output", type=Path)
    return options.parse_args(arguments)


class _Letters:
    """A tokenizer of letters, for the tiny model."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


def _compiled(given: argparse.Namespace) -> SparseModel:
    if given.quick:
        loaded: Any = load_model("zoo:llama", tokenizer=_Letters())
    else:
        loaded = load_model("smollm2")
    made = api.compile(
        loaded.model, given.pipeline, calibration=given.fitted, tokenizer=loaded.tokenizer
    )
    made.tokenizer = loaded.tokenizer
    return made


def _held_out(model: SparseModel, kind: str, tokens: int) -> torch.Tensor:
    """Token ids (n, LENGTH)."""
    _, batches = token_blocks(
        kind, model.tokenizer, length=LENGTH, limit=tokens, split="held-out", seed=0
    )
    return torch.cat(batches)


def _measured(before: SparseModel, after: SparseModel, rows: torch.Tensor) -> dict[str, Any]:
    """Perplexities, KL and counted shares of both, in one run over the text."""
    tallies = {"before": Tally(before), "after": Tally(after)}

    def dense(ids: torch.Tensor) -> Any:
        with all_live(before):
            return before(input_ids=ids, use_cache=False)

    def routed(name: str, model: SparseModel) -> Any:
        def run(ids: torch.Tensor) -> Any:
            tallies[name].reset()
            output = model(input_ids=ids, use_cache=False)
            tallies[name].add()
            return output

        return run

    others = {"before": routed("before", before), "after": routed("after", after)}
    scores = compare(dense, others, [rows])
    drawn = Bootstrap(range(len(rows)))
    found: dict[str, Any] = {"tokens": rows.numel(), "dense": scores["dense"].perplexity}
    for name, tally in tallies.items():
        score = scores[name]
        found[name] = {
            "perplexity": score.perplexity,
            "ratio": score.perplexity / scores["dense"].perplexity,
            "ratio_within": _within(drawn, score, scores["dense"]),
            "kl": score.mean_kl, "top1": score.top1, "counted": tally.flops,
            "live": _mean(tally.shares), "dial": budget((before, after)[name == "after"]),
        }  # fmt: skip
    gap = math.log(found["before"]["ratio"])
    found["gap_closed"] = 1 - math.log(found["after"]["ratio"]) / gap if gap else 0.0
    return found


def _within(drawn: Bootstrap, score: Score, dense: Score) -> list[float] | None:
    """The 95 % interval of the ratio, paired over sequences."""
    if not drawn.possible:
        return None
    mine, theirs = drawn.sums(score.rows), drawn.sums(dense.rows)
    found = drawn.within(np.exp((mine[:, 1] - theirs[:, 1]) / mine[:, 0]))
    return None if found is None else [found.low, found.high]


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / max(len(shares), 1)


def _share(model: SparseModel, rows: torch.Tensor) -> float:
    """Counted operations over dense ones on a sample of the sequences, evenly spread."""
    tally = Tally(model)
    sample = rows[:: max(rows.numel() // MATCHED, 1)]
    with torch.no_grad():
        for ids in sample.split(1):
            tally.reset()
            model(input_ids=ids, use_cache=False)
            tally.add()
    return _mean(tally.shares) if tally.flops is None else tally.flops


def _turned(model: SparseModel, rows: torch.Tensor, active: float, wanted: float) -> float:
    """Turn the dial to the highest place tried that counts at most ``wanted``; the share there."""
    tried: list[tuple[float, float]] = []
    dial = active
    for _ in range(5):
        model.set_active(min(dial, 1.0))
        tried.append((_share(model, rows), min(dial, 1.0)))
        if wanted - NEAR <= tried[-1][0] <= wanted:
            break
        dial += wanted - NEAR / 2 - tried[-1][0]
    share, dial = max((row for row in tried if row[0] <= wanted), default=min(tried))
    model.set_active(dial)
    return share


def _short(healing: dict[str, Any]) -> dict[str, Any]:
    """Without each router's row of loads: the sums over routers say enough here."""
    for row in (*healing["evaluations"], healing["start"], healing["final"]):
        row.pop("routers", None)
    return healing


def _shown() -> Any:
    begin = time.process_time()

    def show(event: str, done: int, total: int) -> None:
        if event == "heal" and done % 5 == 0:
            print(f"step {done}/{total}  {time.process_time() - begin:.0f} CPU s", flush=True)

    return show


if __name__ == "__main__":
    main()
