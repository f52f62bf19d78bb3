"""Every ordered pair of passes works, or the second one says why not.

What each pair does is pinned in golden/<model>/pairs.txt; the README's matrix comes from there too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from sparsify import registry
from sparsify.report import Step
from sparsify.report_groups import group_remarks
from tests.contract.zoo_captures import LIMITS, compiled, worst_relative

COMPOSED = ("ffn-moe", "ffn-mohd", "attn-moh", "hidden-route", "depth-mor", "layers-tie")
PAIRS = tuple(itertools.permutations([p for p in COMPOSED if p in registry.names()], 2))


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_dense_limit(name: str, pair: tuple[str, str], dtype: torch.dtype) -> None:
    model = compiled(name, ",".join(pair), dtype)
    first, second = model.report.steps
    assert first.count("applied") > 0
    assert second.count("applied") + second.count("left") > 0
    assert worst_relative(model) <= LIMITS[dtype]
    assert model.report.ok


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_what_pairs_do(name: str, golden: Callable[[str, str], None]) -> None:
    text = ""
    for pair in PAIRS:
        second = compiled(name, ",".join(pair)).report.steps[1]
        text += f"{pair[0]}, then {pair[1]}:\n{_shown(second)}"
    golden(f"{name}/pairs.txt", text)


def _shown(step: Step) -> str:
    groups = group_remarks([r for r in step.remarks if r.kind != "near-miss"])
    return "".join(f"    {g.kind:<8} {', '.join(g.paths)}: {g.reason}\n" for g in groups)
