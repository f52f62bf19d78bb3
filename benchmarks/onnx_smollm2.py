"""SmolLM2 as ONNX: file sizes, parity, 64 greedy tokens beside eager's, and milliseconds a token.

``python benchmarks/onnx_smollm2.py [SAVED] [--active 0.5] [--threads 2] [--weights int4] [--keep
FOLDER]`` takes a folder that ``sparsify compile smollm2 -p ffn-moe --calibration mixed -o SAVED``
wrote (without one it compiles, with routers made from the weights) and exports five files: the
dense model as ``portable`` and for ``ort``, and the model at the budget by masks (``portable``) and
as ``ort`` and ``ort-custom`` choose by measurement on ``--threads`` threads, which may leave layers
dense. Each decodes 64 tokens after a prompt, in turn, ``--rounds`` times; eager has its dials where
the file has them. Threads of a file that has had its turn are left time to fall asleep, and the
first tokens of a turn are not timed. ``--keep`` leaves the files there (those of other weights in a
folder of their own), and takes those that are there: timing can then be run again alone. Writes its
part of benchmarks/results/onnx-smollm2.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsify.codegen.onnx import targets

RESULTS = Path(__file__).parent / "results" / "onnx-smollm2.json"
PROMPT = "The history of the sparse matrix begins with"
COUNT = 64
WARM, ASLEEP = 16, 0.1  # tokens of a turn; seconds (ONNX Runtime's threads look for work for 40 ms)
CHOSEN = ("ort", "ort-custom")  # targets that choose


def files(threads: int) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Name -> whether it is routed, options of export."""
    auto = {"routing": "auto", "threads": threads}
    return {
        "dense": (False, {}),
        "dense, ort": (False, {"target": "ort", "routing": "mask"}),
        "mask": (True, {}),
        **{named(target, threads): (True, {"target": target, **auto}) for target in CHOSEN},
    }


def named(target: str, threads: int) -> str:
    """The file of a target that chose for so many threads."""
    return f"{target}, auto on {threads}"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("saved", nargs="?")
    asked.add_argument("--active", type=float, default=0.5)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--weights", choices=targets.WEIGHTS, default="float32")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--keep", type=Path)
    asked.add_argument("--no-timing", action="store_true", help="write the files only")
    given = asked.parse_args()
    torch.set_num_threads(given.threads)
    names = list(files(given.threads))
    apart = "" if given.weights == "float32" else given.weights  # of the files in float32
    with folder(given.keep and given.keep / apart) as place:
        if not all(known_of(place, name).exists() for name in names):
            exported(given, place)
        if given.no_timing:
            return
        rows = {name: json.loads(known_of(place, name).read_text()) for name in names}
        times = timed(place, given, rows)
    for name, row in rows.items():
        row["ms"] = round(statistics.median(times[name]), 2)
        row["size over dense"] = round(row["bytes"] / rows["dense"]["bytes"], 4)
    found: dict[str, Any] = {"active": given.active, "files": rows}
    for base in ("dense", "dense, ort"):
        for target in CHOSEN:
            pairs = zip(times[base], times[named(target, given.threads)], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            found[f"speedup of {target} over {base}"] = round(ratio, 3)
    print(json.dumps(found, indent=1))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{given.threads} threads {given.weights}"] = found
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def known_of(place: Path, name: str) -> Path:
    """What is known of a file."""
    return place / f"{name}.json"


@contextlib.contextmanager
def folder(kept: Path | None) -> Iterator[Path]:
    """``kept``, or one that goes away."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def exported(given: argparse.Namespace, place: Path) -> None:
    """Write the files that are missing, and what is known of each, with eager's tokens at its
    dials."""
    import sparsify
    from sparsify.runtime import dial

    model: Any = (
        sparsify.load(given.saved) if given.saved
        else sparsify.compile("smollm2", "ffn-moe", verify="off")
    )  # fmt: skip
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for name, (routed, options) in files(given.threads).items():
        if known_of(place, name).exists():
            continue
        model.set_active(given.active if routed else 1.0)
        made = model.export(place / f"{name}.onnx", force=True, weights=given.weights, **options)
        dial.set_each(model, {r: made.active[path] for path, r in dial.routers(model)})
        model.reset_counters()
        with torch.no_grad():
            eager = model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        live = list(model.realised().values())
        known = {
            "forms": made.forms,
            "chosen": [choice.to_dict() for choice in made.choices],
            "bytes": made.size,
            "live": round(sum(live) / len(live), 3) if live else 1.0,
            "parity": {
                f"{case.name} ({case.against})": float(f"{case.relative:.1e}")
                for case in made.cases
            },
            "prompt": ids.tolist(),
            "eager": eager[0, ids.shape[1] :].tolist(),
        }
        print(name, made.text(), flush=True)
        known_of(place, name).write_text(json.dumps(known))


def timed(
    place: Path, given: argparse.Namespace, rows: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """File -> milliseconds of every decoded token, the same ones of every file beside each other;
    ``rows`` learn how many tokens are eager's."""
    import numpy as np

    from sparsify.codegen.onnx.parity import greedy, session

    sessions = {name: session(place / f"{name}.onnx", threads=given.threads) for name in rows}
    prompts = {name: np.array(row.pop("prompt")) for name, row in rows.items()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(given.rounds):
        for name, running in sessions.items():
            time.sleep(ASLEEP)
            tokens, spent = greedy(running, prompts[name], COUNT)
            times[name] += [1e3 * second for second in spent[WARM:]]
            expected = rows[name].pop("eager", None)
            if expected is not None:
                same = sum(a == b for a, b in zip(tokens, expected, strict=True))
                rows[name]["tokens as eager's"] = same
    return times


if __name__ == "__main__":
    main()
