"""Check claims: each region on the real activations of the dense run, then the whole model.

Regions are checked in isolation in one run: wherever a rewritten region ends, its value is compared
with the dense run's and then replaced by it, so the next region again sees dense activations.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.core import REORDERED, Claim
from sparsify.regions import Region
from sparsify.report import Evidence
from sparsify.runtime.spec import is_routed

Proven = tuple[Claim, int]  # a claim, and the roundings on the longest path it is about


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half an ulp at one: 6.0e-8 for float32, 3.9e-3 for bfloat16, 1.1e-16 for float64."""
    return float(torch.finfo(dtype).eps) / 2


def error_between(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest absolute difference, largest absolute expected value), in float64.

    Positions where both are the same infinity, or both NaN, count as equal.
    """
    a, b = found.detach().double(), expected.detach().double()
    if a.shape != b.shape:
        return float("inf"), 0.0
    if a.numel() == 0:
        return 0.0, 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    worst = float(torch.nan_to_num(difference, nan=float("inf")).max())
    return worst, scale


@contextlib.contextmanager
def dense_limit(model: nn.Module) -> Iterator[None]:
    """All units live, through the routed code path (no dense shortcut)."""
    before: list[tuple[Any, Any, Any]] = []
    module: Any
    for module in model.modules():
        if is_routed(module):
            before.append((module, getattr(module, "dispatch", None), _setting(module)))
            if hasattr(module, "dispatch"):
                module.dispatch = "grouped"
            if before[-1][2] is not None:
                module.set_active(1.0)
    try:
        yield
    finally:
        for module, dispatch, setting in before:
            if dispatch is not None:
                module.dispatch = dispatch
            if hasattr(module, "setting"):
                module.setting = setting
            elif setting is not None:
                module.set_active(setting)


def _setting(module: Any) -> Any:
    """What brings a module's own dial back; None where it has none."""
    if not hasattr(module, "set_active"):
        return None
    return getattr(module, "setting", None) or float(module.active)


class _Forced(fx.Interpreter):
    """Runs a graph; at given nodes compares the value with the dense one and goes on with that."""

    def __init__(self, gm: fx.GraphModule, dense: Mapping[fx.Node, Tensor]) -> None:
        super().__init__(gm)
        self.dense = dense
        self.errors: dict[fx.Node, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.dense:
            self.errors[n] = error_between(value, self.dense[n])
            return self.dense[n]
        return value


def forced_values(
    gm: fx.GraphModule,
    example: Sequence[Tensor],
    marks: Mapping[fx.Node, Tensor],
    wanted: Sequence[fx.Node],
) -> dict[fx.Node, Any]:
    """Values of ``wanted`` nodes in a run whose marked nodes are replaced by the dense values."""
    found: dict[fx.Node, Any] = {}

    class Collect(_Forced):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                found[n] = value
            return value

    with torch.no_grad(), dense_limit(gm):
        Collect(gm, marks).run(*example)
    return found


def check_regions(
    gm: fx.GraphModule,
    example: Sequence[Tensor],
    rewritten: Sequence[tuple[Region, Sequence[Proven]]],
    dense: Mapping[str, Tensor],
    also_force: Sequence[Region] = (),
) -> list[Evidence]:
    """Evidence for each rewritten region, on dense activations.

    Args:
        gm: the graph after the pass.
        example: flat example inputs.
        rewritten: (region, its claim and those of routed modules that it took along).
        dense: region key (``kind:path``) -> result of the dense run.
        also_force: other regions whose results are also replaced by the dense ones.
    """
    shown = [r.whole for r in [*also_force, *(r for r, _ in rewritten)]]
    marks = {r.ports["y"]: dense[key(r)] for r in shown}
    runner = _Forced(gm, marks)
    with torch.no_grad(), dense_limit(gm):
        runner.run(*example)
    found = []
    for region, claims in rewritten:
        error, scale = runner.errors[region.whole.ports["y"]]
        dtype = dense[key(region.whole)].dtype
        limit = allowed(claims, dtype, scale)
        found.append(
            Evidence(
                "region",
                region.path,
                _named(claims),
                _dtype(dtype),
                error,
                scale,
                limit,
                error <= limit,
            )
        )
    return found


def check_end_to_end(
    gm: fx.GraphModule,
    example: Sequence[Tensor],
    golden: Sequence[Tensor],
    claims: Sequence[Proven],
) -> Evidence:
    """Evidence for the model's outputs, all rewrites so far together.

    The rounding lengths of all rewritten regions add up, since each region's error enters the
    residual stream once. The worst output, by error over tolerance, stands for all.
    """
    with torch.no_grad(), dense_limit(gm):
        outputs = gm(*example)
    worst: Evidence | None = None
    for found, expected in zip(outputs, golden, strict=True):
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        error, scale = error_between(found, expected)
        limit = allowed(claims, expected.dtype, scale)
        this = Evidence(
            "end-to-end",
            "",
            _named(claims),
            _dtype(expected.dtype),
            error,
            scale,
            limit,
            error <= limit,
        )
        if worst is None or _badness(this) > _badness(worst):
            worst = this
    assert worst is not None, "a captured graph has a floating point output"
    return worst


def allowed(claims: Sequence[Proven], dtype: torch.dtype, scale: float) -> float:
    """Largest absolute error that rewrites with these claims may give together."""
    if all(claim.kind == "EXACT" for claim, _ in claims):
        return 0.0
    if any(claim.kind == "APPROXIMATE" for claim, _ in claims):
        return float("inf")
    length = sum(n for claim, n in claims if claim.kind == "REORDERED")
    eps = sum(claim.eps for claim, _ in claims)
    reordered = REORDERED.tolerance(unit_roundoff(dtype), length, scale) if length else 0.0
    return reordered + eps * max(scale, 1e-30)


def _named(claims: Sequence[Proven]) -> str:
    return "+".join(sorted({str(claim) for claim, _ in claims}))


def _badness(evidence: Evidence) -> float:
    if math.isinf(evidence.tolerance):
        return evidence.error / max(evidence.scale, 1e-30)
    return evidence.error / evidence.tolerance if evidence.tolerance > 0 else evidence.error * 1e30


def key(region: Region) -> str:
    """A region's name that is unique in its graph."""
    return f"{region.kind}:{region.path}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
