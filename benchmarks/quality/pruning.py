"""Top-k experts with and without MC-MoE's online pruning, at the work that is really done.

    python benchmarks/quality/pruning.py

Writes benchmarks/results/pruning.json. ffn-moe is compiled once; then its routers get one rule
after the other: top-k, top-k without the experts whose weight is below ``mu`` times the first's
(all tokens, or all but the most important ones), and one threshold per layer. What stands in for
dead experts is fitted again for each rule. Each is measured at a few budgets: KL to the dense model
beside the share of (token, expert) pairs that were computed, shared experts included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import common
import torch

import sparsify
from sparsify.corpus import token_text
from sparsify.passes.ffn_moe import FfnMoe
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.model import SparseModel
from sparsify.runtime.rule import RoutingRule
from sparsify.runtime.rules import TopK
from sparsify.runtime.rules_cut import Threshold
from sparsify.runtime.rules_pruned import PrunedTopK
from sparsify.settle import settle

MUS = (0.25, 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.options(__doc__, "pruning.json", 2048)
    options.add_argument("--kinds", default="docstrings", help="texts to measure on")
    options.add_argument("--fitted", default="mixed", help="the text to fit on")
    options.add_argument("--fitting", type=int, default=1024, help="tokens to fit stand-ins on")
    options.set_defaults(active="0.8,0.65,0.5")
    given = options.parse_args(arguments)
    loaded = common.model("smollm2", "zoo:llama" if given.quick else None)
    tables = common.Tables(given.output, model=loaded.name, fitted=given.fitted)
    sparse = sparsify.compile(
        loaded.model, "ffn-moe{router=top-k prune=0.5}", calibration=given.fitted,
        tokenizer=loaded.tokenizer, seed=given.seed, verify="off",
    )  # fmt: skip
    layers = [m for m in sparse.graph.modules() if isinstance(m, RoutedFFN)]
    pruned = [layer.router.selector for layer in layers]  # each with its level of importance
    assert all(isinstance(rule, PrunedTopK) for rule in pruned)
    fitting = token_text(given.fitted, loaded.tokenizer, limit=given.fitting, seed=given.seed)
    rows = torch.cat(list(fitting.batches))
    for kind in given.kinds.split(","):
        text = token_text(
            kind, loaded.tokenizer, limit=given.tokens, seed=given.seed, split="held-out"
        )
        dense, found = common.Dense(loaded.model, list(text.batches)), []
        for name, rules in ways(pruned):
            for layer, rule in zip(layers, rules, strict=True):
                layer.router.rule = rule
            flat = sparse.call_spec.flatten((), {"input_ids": rows})
            settle(sparse.graph, [(layer, FfnMoe()) for layer in layers], flat, flat)
            for active in [float(a) for a in given.active.split(",")]:
                found.append({"rule": name, "active": active, **measured(sparse, dense, active)})
                print(found[-1], flush=True)
        lines = [
            f"{r['rule']:<28} active {r['active']:.0%}  computed {r['share']:.1%}  KL {r['kl']:.4f}"
            f"  perplexity {r['ratio']:.4f} x dense"
            for r in found
        ]
        tables.add(
            f"experts pruned online, fitted on {given.fitted}, measured on {kind}",
            "\n".join(lines),
            {"measured": kind, "tokens": given.tokens, "rows": found},
        )


def ways(pruned: Sequence[Any]) -> Iterator[tuple[str, list[RoutingRule]]]:
    """(name, a rule for every layer)."""
    yield "top-k", [TopK() for _ in pruned]
    for mu in MUS:
        yield f"top-k, mu={mu:g}", [dataclasses.replace(rule, mu=mu) for rule in pruned]
    yield f"top-k, mu={mu:g}, none protected", [PrunedTopK(mu=mu) for _ in pruned]
    yield "threshold", [Threshold() for _ in pruned]


def measured(sparse: SparseModel, dense: common.Dense, active: float) -> dict[str, float]:
    """KL and perplexity beside the dense model, and the share that was computed."""
    sparse.set_active(active)
    reset(sparse)
    found = dense.beside(sparse)
    work = [counter for _, counter in counters(sparse)]
    return {"share": sum(c.rows for c in work) / sum(c.rows_dense for c in work), **found}


if __name__ == "__main__":
    main()
