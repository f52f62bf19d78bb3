"""SmolLM2 as ONNX: file sizes, parity, and 64 greedy tokens of ONNX Runtime beside eager's.

``python benchmarks/onnx_smollm2.py [SAVED] [--active 0.5] [--target ort] [--routing auto]`` takes a
folder that ``sparsify compile smollm2 -p ffn-moe --calibration mixed -o SAVED`` wrote (without one
it compiles, with routers made from the weights), exports it at the budget and at its dense limit,
and writes benchmarks/results/onnx-smollm2.json. Milliseconds are of one decoded token, the two
files in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "onnx-smollm2.json"
PROMPT = "The history of the sparse matrix begins with"
COUNT = 64


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("saved", nargs="?")
    asked.add_argument("--active", type=float, default=0.5)
    asked.add_argument("--target", default="portable")
    asked.add_argument("--routing")
    given = asked.parse_args()
    import sparsify

    model: Any = (
        sparsify.load(given.saved) if given.saved
        else sparsify.compile("smollm2", "ffn-moe", verify="off")
    )  # fmt: skip
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(row := measured(model, ids, Path(folder), given), indent=1))
    RESULTS.write_text(json.dumps(row, indent=1) + "\n")


def measured(model: Any, ids: Any, folder: Path, given: Any) -> dict[str, Any]:
    """Both files of one model."""
    from sparsify.codegen.onnx.parity import greedy, session
    from sparsify.runtime import dial

    model.set_active(1.0)
    dense = model.export(folder / "dense.onnx", check=False)
    model.set_active(given.active)
    routed = model.export(folder / "routed.onnx", target=given.target, routing=given.routing)
    chosen = {router: routed.active[path] for path, router in dial.routers(model)}
    dial.set_each(model, chosen)  # layers that auto wrote dense
    model.reset_counters()
    with torch.no_grad():
        eager = model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
    expected = eager[0, ids.shape[1] :].tolist()
    live = list(model.realised().values())
    times: dict[str, list[float]] = {"dense": [], "routed": []}
    tokens: dict[str, list[int]] = {}
    for _ in range(2):
        for name, found in (("dense", dense), ("routed", routed)):
            tokens[name], spent = greedy(session(found.files[0], threads=2), ids.numpy(), COUNT)
            times[name] += spent[1:]  # the first is the prefill
    return {
        "active": given.active,
        "target": given.target,
        "routing": given.routing,
        "forms": routed.forms,
        "live": round(sum(live) / len(live), 3),
        "same_tokens": sum(a == b for a, b in zip(tokens["routed"], expected, strict=True)),
        "bytes_routed": routed.size,
        "bytes_dense": dense.size,
        "size_ratio": round(routed.size / dense.size, 4),
        "parity": {case.name: float(f"{case.relative:.1e}") for case in routed.cases},
        **{f"ms_{k}": round(statistics.median(v) * 1e3, 2) for k, v in times.items()},
    }


if __name__ == "__main__":
    main()
