"""Experts in few bits: SmolLM2 with rounded experts beside the model itself.

    python benchmarks/quality/bits.py

Writes benchmarks/results/bits.json. ffn-moe is compiled once; then its experts are stored in
``--bits``, once as ``ffn-bits`` allots them (more where it loses more) and once in as many bits
each (where that number is whole, and the next whole one above else), and measured on held-out text
with all experts live, where only rounding is lost, and at the lower budgets. Stand-ins of dead
experts are ffn-moe's for all rows: the difference between two of them is that of the bits.

4,096 tokens take about half an hour of two cores. The pass itself fits stand-ins with the rounded
experts, so at low budgets it loses a little less than this table says.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import common
import torch
from torch import nn

import sparsify
from sparsify.corpus import token_text
from sparsify.passes._bits import allotted, group_of, histogram, losses
from sparsify.runtime.few_bits import FewBitsFFN
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.graph import attach
from sparsify.runtime.model import SparseModel

GROUP = 64


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.options(__doc__, "bits.json", 4096)
    options.add_argument("--bits", default="8,6,4,3.5,3,2.5", help="means, of a weight")
    options.add_argument("--kinds", default="docstrings", help="texts to measure on")
    options.add_argument("--fitted", default="mixed", help="the text to fit on")
    options.add_argument("--fitting", type=int, default=2048, help="tokens that bits are fitted on")
    options.set_defaults(active="1,0.5")
    given = options.parse_args(arguments)
    loaded = common.model("smollm2", "zoo:llama" if given.quick else None)
    tables = common.Tables(given.output, model=loaded.name, group=GROUP)
    sparse = sparsify.compile(
        loaded.model, "ffn-moe", calibration=given.fitted, tokenizer=loaded.tokenizer,
        seed=given.seed,
    )  # fmt: skip
    layers = {p: m for p, m in sparse.graph.named_modules() if isinstance(m, RoutedFFN)}
    fitting = token_text(given.fitted, loaded.tokenizer, limit=given.fitting, seed=given.seed)
    seen = inputs_of(sparse, layers, list(fitting.batches))
    sparse.set_active(1.0)
    lost = {
        path: losses(layer, seen[path], group_of(layer, GROUP)) for path, layer in layers.items()
    }
    for kind in given.kinds.split(","):
        text = token_text(
            kind, loaded.tokenizer, limit=given.tokens, seed=given.seed, split="held-out"
        )
        dense = common.Dense(loaded.model, list(text.batches))
        rows = []
        for active in [float(a) for a in given.active.split(",")]:
            sparse.set_active(active)
            rows.append(row("16 as they are", sparse, dense, active, 0.0))
            for bits in [float(b) for b in given.bits.split(",")]:
                ways: dict[str, dict[str, tuple[int, ...]]] = {
                    f"{bits:g} allotted": {p: allotted(e, bits) for p, (e, _) in lost.items()},
                    f"{math.ceil(bits)} even": {
                        p: (math.ceil(bits),) * layer.experts for p, layer in layers.items()
                    },
                }
                if len({str(widths) for widths in ways.values()}) == 1:  # nothing to allot
                    ways.popitem()
                for name, widths in ways.items():
                    with stored(sparse, layers, widths, {p: i for p, (_, i) in lost.items()}) as b:
                        rows.append(row(name, sparse, dense, active, b))
                    first = next(iter(widths.values()))
                    rows[-1]["first layer"] = histogram(first)
        lines = [
            f"{r['bits']:>16}  active {r['active']:.0%}  {r['stored']:5.2f} a weight with scales  "
            f"perplexity {r['ratio']:.4f} x dense  KL {r['kl']:.4f}"
            for r in rows
        ]
        tables.add(
            f"experts in few bits, fitted on {given.fitted}, measured on {kind}",
            "\n".join(lines),
            {"calibrated": given.fitted, "measured": kind, "tokens": given.tokens, "rows": rows},
        )


def row(
    name: str, sparse: SparseModel, dense: common.Dense, active: float, stored_bits: float
) -> dict[str, object]:
    """Perplexity and KL of the model as it is now, beside the dense one."""
    found = dense.beside(sparse)
    print(f"{name}, active {active:g}: KL {found['kl']:.4f}", flush=True)
    return {"bits": name, "active": active, "stored": stored_bits or 32.0, **found}


def inputs_of(
    model: SparseModel, layers: Mapping[str, RoutedFFN], batches: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Path -> the layer's inputs (T, D) on these tokens, everything live."""
    model.set_active(1.0)
    found: dict[str, list[torch.Tensor]] = {path: [] for path in layers}

    def keep(path: str) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[path].append(inputs[0].reshape(-1, inputs[0].shape[-1]))

        return layers[path].register_forward_pre_hook(hook)

    handles = [keep(path) for path in layers]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return {path: torch.cat(parts) for path, parts in found.items()}


@contextlib.contextmanager
def stored(
    model: SparseModel,
    layers: Mapping[str, RoutedFFN],
    widths: Mapping[str, Sequence[int]],
    importance: Mapping[str, torch.Tensor | None],
) -> Iterator[float]:
    """Inside, the experts are stored so; gives the bits of a weight, scales included."""
    made = []
    for path, layer in layers.items():
        few = FewBitsFFN.of(layer, widths[path], group_of(layer, GROUP), importance[path])
        few.pass_name = layer.pass_name
        attach(model.graph, path, few)
        made.append(few)
    try:
        yield sum(few.mean_bits for few in made) / len(made)
    finally:
        for path, layer in layers.items():
            attach(model.graph, path, layer)


if __name__ == "__main__":
    main()
