"""Budget search against one even budget and the dial's own allocation, on held-out text.

``python benchmarks/search.py`` searches SmolLM2-135M for 60 % of the dense FLOPs with hidden-route,
then measures every setting that was tried at that cost on the held-out half of two kinds of text:
perplexity beside the dense model's, and how much of the even budget's gap the search closes. Costs
are counted again there, by the units that were really live. Writes benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from sparsify import api
from sparsify.corpus import token_blocks
from sparsify.costs import routed_cost
from sparsify.models import load_model
from sparsify.pipeline import Placed
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import set_active, set_each
from sparsify.searching import PASSES, search
from sparsify.searching_measure import divergence
from sparsify.text import parse

KINDS = ("docstrings", "licences")
RESULTS = Path(__file__).parent / "results" / "search.json"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--target", default="flops=0.6")
    options.add_argument("--passes", default=PASSES)
    options.add_argument("--calibration", default="docstrings")
    options.add_argument("--tokens", type=int, default=4096, help="of each held-out text")
    options.add_argument("--searched", type=int, default=512, help="tokens that are searched on")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--points", type=int, default=6)
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    loaded: Any = load_model("smollm2")
    start = time.perf_counter()
    found = search(
        loaded.model, given.target, passes=given.passes, calibration=given.calibration,
        tokenizer=loaded.tokenizer, tokens=given.searched, rounds=given.rounds,
        points=given.points, progress=lambda what, at, of: at == of and print(what, flush=True),
    )  # fmt: skip
    took = time.perf_counter() - start
    print(found.text_table(width=120), f"\nsearched in {took / 60:.1f} minutes", flush=True)
    placed: list[Placed] = []
    sparse = api.compile(
        loaded.model, given.passes, calibration=given.calibration, tokenizer=loaded.tokenizer,
        verify="off", on_step=lambda _, state: placed.extend(state.placed[len(placed) :]),
    )  # fmt: skip
    rows = []
    for kind in KINDS:
        _, batches = token_blocks(kind, loaded.tokenizer, limit=given.tokens, split="held-out")
        ids = [row for batch in batches for row in batch.split(1)]
        dense: list[torch.Tensor] = []
        base = even = 0.0
        for candidate in (None, *found.tried):
            set_active(sparse.graph, 1.0)
            if candidate is not None:
                stages = parse(candidate.pipeline)
                at = {p: stages[p.stage].options_at(p.region).get("active", 1.0) for p in placed}
                set_each(sparse.graph, {r: float(at[p]) for p in placed for r in p.routers})
            nll, kl, share = run(sparse, ids, dense)
            perplexity = math.exp(nll)
            base = base or perplexity
            name = candidate.name if candidate else "dense"
            even = perplexity if name == "even" else even
            closed = (even - perplexity) / (even - base) if even > base else 0.0
            row = {"text": kind, "setting": name, "perplexity": perplexity, "kl": kl}
            row |= {"ratio": perplexity / base, "flops": share, "gap_closed": closed}
            rows.append(row)
            print(
                f"{kind:<12}{name:<18}{share:>8.3f} of the FLOPs, perplexity {perplexity:.2f}, x "
                f"{perplexity / base:.3f}, KL {kl:.4f}, {closed:.0%} of the even budget's gap",
                flush=True,
            )
    report = {"model": "smollm2", "machine": api.machine(), "minutes": took / 60}
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(
        json.dumps({**report, "rows": rows, "search": found.to_dict()}, indent=1) + "\n"
    )


def run(
    sparse: Any, ids: list[torch.Tensor], dense: list[torch.Tensor]
) -> tuple[float, float, float]:
    """(negative log-likelihood, KL to dense, counted FLOPs over dense); fills ``dense`` first."""
    first = not dense
    reset(sparse)
    nll = kl = 0.0
    count = 0
    with torch.no_grad():
        for number, row in enumerate(ids):
            logits = sparse(input_ids=row, use_cache=False).logits
            if first:  # half precision: 4,096 tokens are 0.4 GB
                dense.append(logits.log_softmax(-1).half())
            values, lost = divergence(logits, dense[number].float(), row)
            nll, kl, count = nll + lost, kl + float(values.sum()), count + len(values)
    live = {
        sparse.get_submodule(path): c.live_fraction for path, c in counters(sparse) if c.units_total
    }
    nodes = [n for n in sparse.graph.graph.nodes if n.op == "call_module"]
    report = sparse.report
    spent = routed_cost(sparse.graph, nodes, context=report.context, live=live)
    set_active(sparse.graph, 1.0)
    routed = routed_cost(sparse.graph, nodes, context=report.context)
    flops = report.sparse.flops_per_token - routed.flops + spent.flops
    return nll / count, kl / count, flops / report.dense.flops_per_token


if __name__ == "__main__":
    main()
