"""SmolLM2 as ONNX: file sizes, parity, 64 greedy tokens beside eager's, and milliseconds a token.

``python benchmarks/onnx_smollm2.py [SAVED] [--active 0.5] [--keep FOLDER]`` takes a folder that
``sparsify compile smollm2 -p ffn-moe --calibration mixed -o SAVED`` wrote (without one it compiles,
with routers made from the weights) and exports five files: the dense model as ``portable`` and for
``ort``, and the model at the budget by masks (``portable``) and as ``ort`` and ``ort-custom``
choose by measurement, which may leave layers dense. Each decodes 64 tokens after a prompt, in turn,
``--rounds`` times; eager has its dials where the file has them. ``--keep`` leaves the files there,
and takes those that are there: timing can then be run again alone. Writes
benchmarks/results/onnx-smollm2.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "onnx-smollm2.json"
PROMPT = "The history of the sparse matrix begins with"
COUNT = 64
FILES: dict[str, tuple[bool, dict[str, Any]]] = {  # name -> routed, options of export
    "dense": (False, {}),
    "dense, ort": (False, {"target": "ort", "routing": "mask"}),
    "mask": (True, {}),
    "ort": (True, {"target": "ort", "routing": "auto"}),
    "ort-custom": (True, {"target": "ort-custom", "routing": "auto"}),
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("saved", nargs="?")
    asked.add_argument("--active", type=float, default=0.5)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--keep", type=Path)
    given = asked.parse_args()
    torch.set_num_threads(given.threads)
    with folder(given.keep) as place:
        if not (place / "made.json").exists():
            (place / "made.json").write_text(json.dumps(exported(given, place), indent=1))
        found = json.loads((place / "made.json").read_text())
        times = timed(place, found.pop("prompt"), given, found["files"])
    for name, row in found["files"].items():
        row["ms"] = round(statistics.median(times[name]), 2)
    for base in ("dense", "dense, ort"):
        for name in ("ort", "ort-custom"):
            pairs = zip(times[base], times[name], strict=True)
            found[f"speedup of {name} over {base}"] = round(
                statistics.median(a / b for a, b in pairs), 3
            )
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps({**found, "threads": given.threads}, indent=1) + "\n")


@contextlib.contextmanager
def folder(kept: Path | None) -> Iterator[Path]:
    """``kept``, or one that goes away."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def exported(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Write all files; what is known of them, and eager's tokens at each file's dials."""
    import sparsify
    from sparsify.runtime import dial

    model: Any = (
        sparsify.load(given.saved) if given.saved
        else sparsify.compile("smollm2", "ffn-moe", verify="off")
    )  # fmt: skip
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    rows: dict[str, Any] = {}
    for name, (routed, options) in FILES.items():
        model.set_active(given.active if routed else 1.0)
        made = model.export(place / f"{name}.onnx", force=True, **options)
        dial.set_each(model, {r: made.active[path] for path, r in dial.routers(model)})
        model.reset_counters()
        with torch.no_grad():
            eager = model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        live = list(model.realised().values())
        rows[name] = {
            "forms": made.forms,
            "chosen": [choice.to_dict() for choice in made.choices],
            "bytes": made.size,
            "live": round(sum(live) / len(live), 3) if live else 1.0,
            "parity": {case.name: float(f"{case.relative:.1e}") for case in made.cases},
            "eager": eager[0, ids.shape[1] :].tolist(),
        }
        print(name, made.text(), flush=True)
        rows[name]["size over dense"] = round(made.size / rows["dense"]["bytes"], 4)
    return {"active": given.active, "prompt": ids.tolist(), "files": rows}


def timed(
    place: Path, prompt: Any, given: argparse.Namespace, rows: dict[str, Any]
) -> dict[str, list[float]]:
    """File -> milliseconds of every decoded token, the same ones of every file beside each other;
    ``rows`` learn how many tokens are eager's."""
    import numpy as np

    from sparsify.codegen.onnx.parity import greedy, session

    sessions = {name: session(place / f"{name}.onnx", threads=given.threads) for name in FILES}
    times: dict[str, list[float]] = {name: [] for name in FILES}
    for _ in range(given.rounds):
        for name, running in sessions.items():
            tokens, spent = greedy(running, np.array(prompt), COUNT)
            times[name] += [1e3 * second for second in spent[1:]]  # the first is the prefill
            expected = rows[name].pop("eager", None)
            if expected is not None:
                same = sum(a == b for a, b in zip(tokens, expected, strict=True))
                rows[name]["tokens as eager's"] = same
    return times


if __name__ == "__main__":
    main()
