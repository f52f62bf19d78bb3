"""Next tokens: a routed SmolLM2 beside dense, static pruning and TEAL, on held-out text.

    python benchmarks/quality/text.py --pipeline ffn-moe
    python benchmarks/quality/text.py --pipeline hidden-route
    python benchmarks/quality/text.py --pipeline attn-moh --fitted docstrings

Each writes benchmarks/results/quality-PIPELINE.json. The model is compiled once for each kind of
text that it is ``--fitted`` on, and measured on the held-out half of every kind in ``--kinds``, so
also on text unlike what it was fitted on. Static pruning drops as many units for every token as the
routed model really did; TEAL drops small inputs of every matrix, at as many operations as the
routed model was counted to do. Intervals are paired with dense, over whole texts.

51,200 tokens of a kind take about 200 runs of 256 tokens for every row of a table, and for dense
twice: an hour of two cores for a kind of text. ``--tokens 4096`` is a look.
"""

from __future__ import annotations

from collections.abc import Sequence

import common

import sparsify
from sparsify import api
from sparsify.report_json import encode

KINDS = ("docstrings", "licences", "code")


def main(arguments: Sequence[str] | None = None, tokens: int = 51_200) -> None:
    options = common.options(__doc__, "", tokens)
    options.add_argument("--pipeline", default="ffn-moe")
    options.add_argument("--kinds", default=",".join(KINDS), help="of text to measure on")
    options.add_argument("--fitted", default="docstrings,licences", help="kinds to fit on")
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
        for kind in given.kinds.split(","):
            found = api.evaluate(sparse, kind, calibration=fitted, **common.measuring(given))
            quality = found.quality
            assert quality is not None
            tables.add(
                f"fitted on {fitted}, measured on {kind}",
                quality.render(100),
                {"calibrated": fitted, "measured": kind, **quality.to_dict(),
                 "routing": encode(found.routing)},
            )  # fmt: skip


if __name__ == "__main__":
    main()
