"""Depth routing beside static layer dropping, on SmolLM2-135M: perplexity by layers computed.

``python benchmarks/depth.py`` compiles depth-mod and depth-mor (calibrated on docstrings, nothing
trained), measures them on held-out docstrings at several budgets, and drops as many of all 30
layers for every token, in the best of four ways (sparsify/static_layers.py). Prints the table and
writes benchmarks/results/depth.json. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sparsify import api
from sparsify.corpus import Split, token_blocks
from sparsify.evaluate import compare, dense_run, pruned_run
from sparsify.models import load_model
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import kept, set_active
from sparsify.static_layers import (
    LayerPlan,
    LayerRanking,
    layer_plans,
    layers_of,
    rank_layers,
)

RESULTS = Path(__file__).parent / "results" / "depth.json"
PIPELINES = {
    "depth-mod": (0.9, 0.75, 0.5),
    "depth-mor{recursions=3}": (0.9, 0.75, 0.5),
    "depth-mor{recursions=3,choice=token}": (0.9, 0.75, 0.5),
    "depth-mor{recursions=2,sharing=middle-cycle}": (0.9, 0.75, 0.5),
    "depth-mor{recursions=3,sharing=sequence}": (0.9, 0.75, 0.5),
    "depth-mor{recursions=3,kv=recursion}": (0.9,),
    "depth-mor{recursions=3,kv=shared}": (0.9,),
    "depth-mod{kv=live}": (0.9,),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=4096, help="of held-out text")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    loaded: Any = load_model("smollm2")
    count = loaded.model.config.num_hidden_layers
    held_out = texts(loaded.tokenizer, "held-out", given.tokens)
    fitted = texts(loaded.tokenizer, "calibration", 8192)
    rows: list[dict[str, Any]] = []
    shares: set[float] = set()
    vehicle = None
    for pipeline, budgets in PIPELINES.items():
        sparse: Any = api.compile(
            loaded.model, pipeline, calibration="docstrings", tokenizer=loaded.tokenizer
        )
        vehicle = vehicle or sparse
        for active in budgets:
            row = measured(sparse, vehicle, held_out, active, count)
            rows.append({"model": pipeline, "active": active, **row})
            shares.add(row["layers"])
            print(f"{pipeline:<46}{active:>6}{row['layers']:>8.1%}{row['ratio']:>9.3f}", flush=True)
    assert vehicle is not None
    ranking = rank_layers(vehicle, vehicle, fitted)
    for dropped in sorted({int((1 - share) * count + 1e-6) for share in shares} - {0}):
        rows += dropping(vehicle, ranking, dropped, held_out)
    report = {"model": "smollm2", "text": "docstrings", "machine": api.machine(), "rows": rows}
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(report, indent=1) + "\n")


def texts(tokenizer: Any, split: Split, tokens: int) -> list[torch.Tensor]:
    """Batches of token ids of one half of the docstrings."""
    return token_blocks("docstrings", tokenizer, length=256, limit=tokens, split=split)[1]


def dropping(model: Any, ranking: LayerRanking, count: int, held_out: Any) -> list[dict[str, Any]]:
    """The best way to drop ``count`` layers for every token, and the one that leaves the last out.

    The latter is what a token does that leaves a recursion early.
    """
    ways = layer_plans(ranking, 1 - count / len(ranking.paths))
    last = range(len(ranking.paths) - count, len(ranking.paths))
    biases = {ranking.paths[at]: ranking.change[at] for at in last}
    ways.append(LayerPlan(biases, len(ranking.paths), "the last layers, mean added back"))
    scores = compare(
        dense_run(model, model), {way.note: pruned_run(model, model, way) for way in ways}, held_out
    )
    best = min(ways, key=lambda way: scores[way.note].perplexity)
    rows = []
    for way in (best, ways[-1]):
        ratio = scores[way.note].perplexity / scores["dense"].perplexity
        rows.append({"model": "static", "layers": way.active, "ratio": ratio, "note": way.note})
        print(f"{'static: ' + way.note:<62}{way.active:>8.1%}{ratio:>9.3f}", flush=True)
    return rows


def measured(model: Any, vehicle: Any, held_out: Any, active: float, count: int) -> dict[str, Any]:
    """Perplexity over the dense model's, and the share of all layers that tokens ran.

    Args:
        vehicle: a routed model whose dense limit is the dense model (with kv=shared it is not).
    """
    tokens = {"live": 0, "all": 0}
    paths = set(layers_of(model))

    def routed(ids: torch.Tensor) -> Any:
        with kept(model):
            set_active(model, active, warn=False)
            reset(model)
            out = model(ids)
        for path, counter in counters(model):
            if path in paths:
                tokens["live"] += counter.units_live
                tokens["all"] += counter.units_total
        return out

    scores = compare(dense_run(vehicle, vehicle), {"routed": routed}, held_out)
    live = tokens["live"] / tokens["all"]
    layers = (len(paths) * live + count - len(paths)) / count
    return {
        "layers": layers,
        "live": live,
        "ratio": scores["routed"].perplexity / scores["dense"].perplexity,
        "kl": scores["routed"].mean_kl,
    }


if __name__ == "__main__":
    main()
