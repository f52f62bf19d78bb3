"""A routed feed-forward layer in ONNX Runtime: dense, by masks, in branches, and the ideal.

``python benchmarks/onnx_ffn.py [--shape 2048x8192] [--experts 8] [--active 0.5] [--tokens 1,8]``
exports one gated layer three times and times the sessions in turn, two threads, weights out of
cache where they are larger than it. The ideal is dense times the share of expert weights that the
tokens use (up to 8 tokens: reading them bounds), or of operations. Writes
benchmarks/results/onnx-ffn.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results" / "onnx-ffn.json"


class Layer(nn.Module):
    """A block of one feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in "gu")
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.gate(x)) * self.up(x)
        found: torch.Tensor = x + self.down(hidden)
        return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--shape", default="2048x8192")
    asked.add_argument("--experts", type=int, default=8)
    asked.add_argument("--active", type=float, default=0.5)
    asked.add_argument("--tokens", default="1,8,64,512")
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--threads", type=int, default=2)
    given = asked.parse_args()
    width, hidden = map(int, given.shape.split("x"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sessions, model = _sessions(Path(folder), width, hidden, given)
        for tokens in map(int, given.tokens.split(",")):
            rows.append(_row(sessions, model, width, tokens, given.rounds))
            print(rows[-1], flush=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = f"{given.shape} {given.experts} experts {given.active:g} active {given.threads} threads"
    RESULTS.write_text(json.dumps({**known, key: rows}, indent=1) + "\n")


def _sessions(folder: Path, width: int, hidden: int, given: Any) -> tuple[dict[str, Any], Any]:
    import sparsify
    from sparsify.codegen.onnx.parity import session

    torch.manual_seed(0)
    example = torch.randn(2, 4, width)
    model = sparsify.compile(
        Layer(width, hidden).eval(), f"ffn-moe{{experts={given.experts}}}", (example,), verify="off"
    )
    sessions = {}
    for name, active, routing in (
        ("dense", 1.0, "mask"),
        ("mask", given.active, "mask"),
        ("branch", given.active, "branch"),
    ):
        model.set_active(active)
        file = folder / f"{name}.onnx"
        model.export(file, routing=routing, check=name != "dense", external_data=True)
        sessions[name] = session(file, threads=given.threads)
    return sessions, model


def _row(
    sessions: dict[str, Any], model: Any, width: int, tokens: int, rounds: int
) -> dict[str, Any]:
    x = torch.randn(1, tokens, width)
    name = sessions["dense"].get_inputs()[0].name
    model.reset_counters()
    with torch.no_grad():
        select = next(m for m in model.modules() if type(m).__name__ == "Router")(x)
    used = float((select.reshape(tokens, -1) != 0).any(0).double().mean())
    pairs = float((select != 0).double().mean())
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for _ in range(rounds + 2):
        for kind, running in sessions.items():
            start = time.perf_counter()
            running.run(None, {name: x.numpy()})
            times[kind].append(time.perf_counter() - start)
    best = {kind: statistics.median(found[2:]) * 1e3 for kind, found in times.items()}
    ideal = best["dense"] * (used if tokens <= 8 else pairs)
    return {
        "tokens": tokens,
        **{kind: round(ms, 3) for kind, ms in best.items()},
        "used": round(used, 3),
        "pairs": round(pairs, 3),
        "branch_of_ideal": round(ideal / best["branch"], 2),
    }


if __name__ == "__main__":
    main()
