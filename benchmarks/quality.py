"""Perplexity of a routed model beside static pruning, on two kinds of held-out text.

``python benchmarks/quality.py`` compiles SmolLM2-135M twice (calibrated on each kind of text) and
measures each on both kinds: on its own, and on text unlike what it was calibrated on. Prints the
tables and writes benchmarks/results/quality.json (``--output``: another file). ``--pipeline`` takes
any passes; the tables of the README are those of ffn-moe, hidden-route and attn-moh. About 15
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparsify import api
from sparsify.models import load_model

KINDS = ("docstrings", "licences")
RESULTS = Path(__file__).parent / "results" / "quality.json"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=4096, help="of each text")
    options.add_argument("--pipeline", default="ffn-moe")
    options.add_argument("--active", default="1,0.75,0.5")
    options.add_argument("--kinds", default=",".join(KINDS), help="of text")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    kinds = given.kinds.split(",")
    budgets = [float(a) for a in given.active.split(",")]
    loaded: Any = load_model("smollm2")
    tables = []
    for fitted in kinds:
        sparse = api.compile(
            loaded.model, given.pipeline, calibration=fitted, tokenizer=loaded.tokenizer
        )
        for text in kinds:
            found = api.evaluate(
                sparse, text, active=budgets, calibration=fitted, tokens=given.tokens
            )
            print(
                f"\ncalibrated on {fitted}, measured on {text}\n{found.text(width=120)}", flush=True
            )
            tables.append({"calibrated": fitted, "measured": text, **found.quality.to_dict()})
            report = {"model": "smollm2", "pipeline": given.pipeline, "machine": api.machine()}
            given.output.parent.mkdir(exist_ok=True)
            given.output.write_text(json.dumps({**report, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
