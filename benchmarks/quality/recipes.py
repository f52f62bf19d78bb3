"""What was tried to lose less: ways to score, centre, spend and repair, side by side.

    python benchmarks/quality/recipes.py

Writes benchmarks/results/recipes.json. First, pipelines end to end: each is compiled on text of
``--fitted`` and measured on held-out text of ``--kinds``, with TEAL at as many counted operations
beside it. Then ways that no pass offers (most were tried and left), judged layer by layer: the
squared error of a projection's result that they leave, over the variance of that result, on tokens
that they were not fitted on, at a fixed share of live inputs. RECIPES.md says what came of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import common
import torch
from torch import Tensor

import sparsify
from sparsify import api, teal
from sparsify.corpus import token_text
from sparsify.counted import parts
from sparsify.passes._dead_inputs import usual
from sparsify.runtime.inputs import RoutedLinear

FFN = "at=*.mlp.*"
PIPELINES = (
    "ffn-moe",
    f"hidden-route{{score=teal compensate=false {FFN}}}",
    f"hidden-route{{score=wina {FFN}}}",
    f"hidden-route{{{FFN}}}",
    "hidden-route{score=wina}",
    "hidden-route",
)
KEEP = 0.5  # live inputs, in the second part
RANK = 32
RIDGE = 0.02  # of the mean diagonal, and of each diagonal entry


def dropped(x: Tensor, centre: Tensor, scale: Tensor, keep: float) -> Tensor:
    """What thresholding leaves out of x (T, in): zero where an input is live."""
    away = x - centre
    scores = away.abs() * scale
    cut = scores.flatten().kthvalue(max(int((1 - keep) * scores.numel()), 1)).values
    return away * (scores <= cut)


def left(
    fit: Tensor, test: Tensor, weight: Tensor, keep: float = KEEP
) -> Iterator[tuple[str, float]]:
    """(way, relative squared error that it leaves) of one projection.

    Args:
        fit, test: (T, in) inputs on calibration and on other tokens; weight: (out, in).
    """
    norms = weight.norm(dim=0)
    mean = fit.mean(0)
    whole = ((test - mean) @ weight.T).square().sum()

    def error(lost: Tensor) -> float:
        return float(lost.square().sum() / whole)

    zero, ones = torch.zeros_like(mean), torch.ones_like(mean)
    yield "TEAL: |x|, dead inputs zero", error(dropped(test, zero, ones, keep) @ weight.T)
    yield "WINA: |x| times column norm", error(dropped(test, zero, norms, keep) @ weight.T)
    yield "dead inputs at their mean", error(dropped(test, mean, norms, keep) @ weight.T)
    centre = usual(fit, norms, 1 - keep)
    lost = dropped(test, centre, norms, keep) @ weight.T
    seen = dropped(fit, centre, norms, keep) @ weight.T
    yield "dead inputs at the mean of dead ones", error(lost)
    given, known = (test - centre) @ weight.T - lost, (fit - centre) @ weight.T - seen
    gain = (known * seen).sum(0) / known.square().sum(0).clamp_min(1e-12)
    yield "... and a gain per output", error(lost - given * gain)
    basis = torch.linalg.svd(seen, full_matrices=False)[2][:RANK]
    yield f"... and rank {RANK} of what is lost", error(lost - lost @ basis.T @ basis)
    live = (fit - centre) - dropped(fit, centre, norms, keep)
    gram = live.T @ live
    gram.diagonal().mul_(1 + RIDGE).add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, live.T @ seen)
    alive = (test - centre) - dropped(test, centre, norms, keep)
    yield "... and live columns refitted", error(lost - alive @ change)
    turn = torch.linalg.eigh((fit - mean).T @ (fit - mean))[1]
    turned, spun = (test - mean) @ turn, weight @ turn
    spare = dropped(turned, torch.zeros_like(mean), spun.norm(dim=0), keep)
    yield "inputs turned to principal axes", error(spare @ spun.T)


def inputs_of(sparse: Any, batches: Sequence[Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """Path of a routed projection -> its inputs (T, in), dense."""
    found: dict[str, list[Tensor]] = {}

    def keep(site: str, values: Tensor) -> Tensor:
        if any(f".{layer}." in site for layer in layers):
            found.setdefault(site.removesuffix(".x"), []).append(values.flatten(0, -2))
        return values

    with torch.no_grad(), teal.cutting(sparse, keep):
        for ids in batches:
            sparse(input_ids=ids)
    return {path: torch.cat(rows).float() for path, rows in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.options(__doc__, "recipes.json", 4096)
    options.add_argument("--pipelines", default="|".join(PIPELINES), help="separated by |")
    options.add_argument("--kinds", default="docstrings,licences", help="texts to measure on")
    options.add_argument("--fitted", default="mixed", help="the text to fit on")
    options.add_argument("--layers", default="1,8,16,24,29", help="of the second part")
    given = options.parse_args(arguments)
    loaded = common.model("smollm2", "zoo:llama" if given.quick else None)
    tables = common.Tables(given.output, model=loaded.name, fitted=given.fitted)
    sparse: Any = None
    for pipeline in filter(None, given.pipelines.split("|")):
        sparse = sparsify.compile(
            loaded.model, pipeline, calibration=given.fitted, tokenizer=loaded.tokenizer,
            seed=given.seed,
        )  # fmt: skip
        for kind in given.kinds.split(","):
            found = api.evaluate(
                sparse, kind, calibration=given.fitted, **common.measuring(given)
            ).quality
            assert found is not None
            tables.add(
                f"{pipeline}, measured on {kind}", found.render(100),
                {"pipeline": pipeline, "measured": kind, **found.to_dict()},
            )  # fmt: skip
    if sparse is None or not any(isinstance(m, RoutedLinear) for _, m in parts(sparse)):
        sparse = sparsify.compile(
            loaded.model, "hidden-route", calibration=given.fitted, tokenizer=loaded.tokenizer
        )
    text = token_text(given.fitted, loaded.tokenizer, limit=max(given.tokens, 512), seed=given.seed)
    rows = inputs_of(sparse, list(text.batches), given.layers.split(","))
    modules = dict(parts(sparse))
    for path, x in rows.items():
        module = modules[path]
        assert isinstance(module, RoutedLinear)
        half = len(x) * 3 // 4
        ways = dict(left(x[:half], x[half:], module.columns.detach().t().float()))
        shown = "\n".join(f"  {way:<40} {error:.4f}" for way, error in ways.items())
        tables.add(
            f"{path}: error at {KEEP:.0%} live inputs", shown, {"path": path, "keep": KEEP, **ways}
        )


if __name__ == "__main__":
    main()
