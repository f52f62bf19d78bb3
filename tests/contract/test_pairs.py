"""Every ordered pair of passes works, or the second one says why not.

What each pair does is pinned in golden/<model>/pairs.txt. The README's matrix is made here, from
zoo:llama; ``--accept`` writes it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

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


def test_matrix_in_the_readme(accept: bool) -> None:
    names = [name for name in COMPOSED if name in registry.names()]
    rows = [["first \\\\ then", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    for first in names:
        cells = ["" if first == then else _cell(first, then) for then in names]
        rows.append([f"`{first}`", *cells])
    matrix = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    file = Path(__file__).parents[2] / "README.md"
    text = file.read_text(encoding="utf-8")
    marked = re.compile(r"(?<=<!-- pairs -->\n).*?(?=\n<!-- /pairs -->)", re.DOTALL)
    if accept:
        file.write_text(marked.sub(lambda _: matrix, text), encoding="utf-8")
    else:
        assert marked.findall(text) == [matrix], "to accept: python -m pytest --accept"


def _cell(first: str, then: str) -> str:
    """How many of the regions that the second pass finds in zoo:llama it rewrites."""
    step = compiled("llama", f"{first},{then}").report.steps[1]
    done, left = step.count("applied"), step.count("left")
    return "refused" if not done else "yes" if not left else f"{done} of {done + left}"
