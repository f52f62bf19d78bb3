"""A routed feed-forward layer in ONNX Runtime: every form, the dense layer, and the ideal.

``python benchmarks/onnx_ffn.py [--shapes 2048x8192,576x1536] [--experts 8,64] [--tokens 1,8]``
writes one gated layer (silu, a quarter of the experts shared, threshold router) in each of its
forms and times them in turn, several copies in one session, weights out of the cache
(:mod:`sparsify.codegen.onnx.timing`). Half of the experts are live for every token, drawn at
random. The ideal is dense times the share of
expert weights that the tokens use (up to 8 tokens: reading them bounds), or of operations; the
router, the selection and what ``--compensate`` adds count against the routed forms. Prints a table
and writes benchmarks/results/onnx-ffn.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from ffn_backends import SILU

from sparsify.codegen.onnx import targets, timing
from sparsify.codegen.onnx.asked import Asked
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router

RESULTS = Path(__file__).parent / "results" / "onnx-ffn.json"
WAYS = ("dense", "mask", "branch", "moe", "custom")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--shapes", default="2048x8192,576x1536")
    asked.add_argument("--experts", default="8,64")
    asked.add_argument("--active", type=float, default=0.5)
    asked.add_argument("--tokens", default="1,8,64,512")
    asked.add_argument("--turns", type=int, default=timing.TURNS)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--weights", choices=targets.WEIGHTS, default="float32")
    asked.add_argument("--compensate", action="store_true", help="dead experts are estimated")
    asked.add_argument("--ways", default=",".join(WAYS))
    given = asked.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    print(f"{'':34}" + "".join(f"{way:>17}" for way in (*given.ways.split(","), "ideal")))
    for shape in given.shapes.split(","):
        for experts in map(int, given.experts.split(",")):
            ffn = layer(*map(int, shape.split("x")), experts, given.active, given.compensate)
            key = f"{shape} {experts} experts {given.active:g} active {given.threads} threads"
            key += f" {given.weights}" * (given.weights != "float32")
            known[key + " compensated" * given.compensate] = rows(ffn, key, given)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def layer(width: int, hidden: int, experts: int, active: float, compensate: bool) -> RoutedFFN:
    """With random weights, at its budget."""
    torch.manual_seed(0)
    shared = experts // 4
    router = Router(torch.randn(experts - shared, width), rule="threshold", shared=shared)
    router.calibrate(torch.randn(256, width))
    size = (experts, hidden // experts, width)
    up, gate, down = (torch.randn(size) / width**0.5 for _ in range(3))
    found = RoutedFFN(up, gate, down, None, None, None, activation=SILU, router=router)
    if compensate:
        found.add_stand_ins(
            active, torch.randn(experts, width), torch.randn(experts - shared, width)
        )
    router.set_active(active)
    return found


def rows(ffn: RoutedFFN, key: str, given: Any) -> list[dict[str, Any]]:
    """One per number of tokens."""
    found, live = [], round(ffn.router.live_units(given.active))
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked("ort", "auto", targets.OPSET_ORT, given.weights, threads=given.threads)
        running = timing.sessions(ffn, given.ways.split(","), Path(folder), asked)
        for tokens in map(int, given.tokens.split(",")):
            times = timing.times(running, ffn, live, tokens, given.turns)
            ideal = times["dense"] * (
                used(ffn, live, tokens) if tokens <= 8 else live / ffn.experts
            )
            cells = {way: f"{ms:.3f} ({ideal / ms:.2f})" for way, ms in times.items()}
            label = f"{key.split(' active')[0]} {tokens} tok"
            print(f"{label:34}" + "".join(f"{c:>17}" for c in (*cells.values(), f"{ideal:.3f}")),
                  flush=True)  # fmt: skip
            found.append({
                "tokens": tokens, **{way: round(ms, 4) for way, ms in times.items()},
                "ideal": round(ideal, 4),
                "of_ideal": {w: round(ideal / ms, 3) for w, ms in times.items()},
            })  # fmt: skip
    return found


def used(ffn: RoutedFFN, live: int, tokens: int) -> float:
    """Share of the experts that any of the tokens uses, on average."""
    shared, routed = ffn.router.shared, ffn.router.routed
    return (shared + routed * (1 - (1 - (live - shared) / routed) ** tokens)) / ffn.experts


if __name__ == "__main__":
    main()
