"""Next tokens: a routed SmolLM2 beside dense, static pruning and TEAL, on held-out text.

    python benchmarks/quality/text.py --pipeline "hidden-route{gated=true at=*.mlp.*}"
    python benchmarks/quality/text.py --pipeline "hidden-route{gated=true}"
    python benchmarks/quality/text.py --pipeline ffn-moe --fitted docstrings,licences --kinds code

Each writes benchmarks/results/quality-PIPELINE.json. The model is compiled once for each kind of
text that it is ``--fitted`` on, and measured on the held-out half of every kind in ``--kinds``, so
also on text unlike what it was fitted on; the last table pools the kinds. How much is live depends
on the text, so the dial is turned for each kind until the operations counted on its calibration
half are those of ``--active`` (what a user does who watches the cost); ``--dial`` takes
``--active`` as the dial itself. Static pruning drops as many units for every token as the routed
model really did; TEAL drops small inputs of every matrix, at as many operations as the routed model
was counted to do. Intervals are paired with dense, over whole texts.

25,600 tokens of a kind are 100 runs of 256 tokens for every row of a table, and for dense twice:
about ten minutes of two idle cores. ``--tokens 4096`` is a look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import common
import torch

import sparsify
from sparsify import api, contenders
from sparsify.calibration import BLOCK
from sparsify.corpus import token_text
from sparsify.report import Quality
from sparsify.report_json import encode
from sparsify.runtime.dial import kept

KINDS = ("docstrings", "licences")
WATCHED = 2048  # tokens that operations are counted on, to turn the dial
MARGIN = 0.005  # below what is asked for: held-out text differs
TURNS = 3


def main(arguments: Sequence[str] | None = None, tokens: int = 25_600) -> None:
    options = common.options(__doc__, "", tokens)
    options.set_defaults(active="0.75,0.5")
    options.add_argument("--pipeline", default="hidden-route{gated=true}")
    options.add_argument("--dial", action="store_true", help="do not turn the dial for the text")
    options.add_argument("--kinds", default=",".join(KINDS), help="of text to measure on")
    options.add_argument("--fitted", default="mixed", help="kinds to fit on")
    given = options.parse_args(arguments)
    output = given.output
    if output == common.RESULTS:
        name = "".join(c if c.isalnum() or c in "-," else "-" for c in given.pipeline)
        output = common.RESULTS / f"quality-{name.strip('-')}.json"
    loaded = common.model("smollm2", "zoo:llama" if given.quick else None)
    tables = common.Tables(output, model=loaded.name, pipeline=given.pipeline)
    for fitted in given.fitted.split(","):
        sparse = sparsify.compile(
            loaded.model, given.pipeline, calibration=fitted, tokenizer=loaded.tokenizer,
            seed=given.seed,
        )  # fmt: skip
        measured: list[Quality] = []
        for kind in given.kinds.split(","):
            measuring = common.measuring(given)
            asked = measuring["active"]
            if not given.dial:
                measuring["active"] = [dial(sparse, kind, a, given.seed) for a in asked]
            found = api.evaluate(sparse, kind, calibration=fitted, **measuring)
            quality = found.quality
            assert quality is not None
            measured.append(quality)
            tables.add(
                f"fitted on {fitted}, measured on {kind}",
                quality.render(100),
                {"calibrated": fitted, "measured": kind, "asked": asked, **quality.to_dict(),
                 "routing": encode(found.routing)},
            )  # fmt: skip
        if len(measured) > 1:
            rows = pooled(measured)
            tables.add(f"fitted on {fitted}, all kinds", shown(rows),
                       {"calibrated": fitted, "measured": given.kinds, "pooled": rows,
                        "tokens": sum(q.tokens for q in measured)})  # fmt: skip


def dial(sparse: Any, kind: str, wanted: float, seed: int) -> float:
    """The dial at which the operations counted on a kind's calibration half are as wanted."""
    if wanted >= 1:
        return wanted
    text = token_text(kind, sparse.tokenizer, length=BLOCK, limit=WATCHED, seed=seed)
    aim, active = wanted - MARGIN, wanted
    for _ in range(TURNS):
        tried = contenders.routed(sparse, lambda ids: sparse(input_ids=ids), active)
        with torch.no_grad(), kept(sparse):
            for ids in text.batches:
                tried.contender.run(ids)
        counted = tried.tally.flops
        if counted is None or abs(counted - aim) < MARGIN / 2:
            break
        active = min(max(active * aim / counted, 0.01), 1.0)
    return round(active, 4)


def pooled(measured: Sequence[Quality]) -> list[dict[str, Any]]:
    """Rows over the predicted tokens of all texts: the same models, at the same budgets asked."""
    total = sum(quality.tokens for quality in measured)
    found = []
    for rows in zip(*(quality.rows for quality in measured), strict=True):
        first = rows[0]
        assert {row.model for row in rows} == {first.model}
        same = [(row, q.tokens / total) for row, q in zip(rows, measured, strict=True)]
        counted = [row.flops for row, _ in same if row.flops is not None]
        found.append({
            "model": first.model, "active": [row.active for row in rows],
            "perplexity": math.exp(sum(math.log(row.perplexity) * part for row, part in same)),
            "ratio": math.exp(sum(math.log(row.ratio) * part for row, part in same)),
            "kl": sum((row.kl or 0.0) * part for row, part in same),
            "flops": sum((row.flops or 0.0) * part for row, part in same)
            if len(counted) == len(same) else None,
        })  # fmt: skip
    return found


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """Pooled rows as lines of text."""
    return "\n".join(
        f"  {row['model']:<15} {row['active'][0]:>5.0%}  perplexity {row['perplexity']:8.3f}"
        f"  x{row['ratio']:.3f}  KL {row['kl']:.4f}"
        + ("" if row["flops"] is None else f"  at {row['flops']:.1%} of the operations")
        for row in rows
    )


if __name__ == "__main__":
    main()
