"""Peak memory of a feed-forward layer's prefill: routed and lowered against dense.

``python benchmarks/memory.py`` runs each in a process of its own, which loads the layer, notes its
resident set, runs one prefill and notes the highest it has been (VmHWM): the difference is what the
computation needed. Dense is ``linear(silu(linear) * linear)`` in torch, which holds two or three
(tokens x hidden) tensors; the kernel holds one, of live pairs only, and never one of
tokens x experts x hidden. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
SHAPES = ((576, 1536, 64), (2048, 8192, 64))
TOKENS = (512, 2048)


def main() -> None:
    rows = []
    print(f"{'width/hidden':>14} {'experts':>7} {'tokens':>6} {'active':>6}    dense    routed")
    for width, hidden, experts in SHAPES:
        for tokens in TOKENS:
            dense = _measured("dense", width, hidden, experts, tokens, 1.0)
            for active in (1.0, 0.5, 0.25):
                routed = _measured("routed", width, hidden, experts, tokens, active)
                print(
                    f"{f'{width}/{hidden}':>14} {experts:>7} {tokens:>6} {active:>6.0%}"
                    f" {dense:>6.1f} MB {routed:>6.1f} MB",
                    flush=True,
                )
                rows.append({"width": width, "hidden": hidden, "experts": experts, "tokens": tokens,
                             "active": active, "dense_mb": dense, "routed_mb": routed})  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def _measured(*what: object) -> float:
    said = subprocess.run(
        [sys.executable, __file__, *map(str, what)], capture_output=True, text=True, check=True
    )
    return float(said.stdout)


def _child(kind: str, width: int, hidden: int, experts: int, tokens: int, active: float) -> float:
    """MB that one prefill needs."""
    import ffn_backends as backends
    import torch

    from sparsify.codegen.cpu.ffn import FfnKernel

    layer = backends.Layer.random(width, hidden)
    run: backends.Call = backends.natural(layer)
    if kind == "routed":
        module = backends.routed(layer, torch.randn(experts, width) * 0.05, active)
        module.kernel = FfnKernel(module, lambda count, share: "prefill")
        run = module
    with torch.no_grad():
        run(torch.randn(32, width))  # threads, code pages
        x = torch.randn(tokens, width)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run(x)
        return (_status("VmHWM") - before) / 1e3


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1])
    raise KeyError(key)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, *numbers, share = sys.argv[1:]
        print(_child(kind, *map(int, numbers), float(share)))
    else:
        main()
