"""What three models become, word for word: graph, report, outputs (``pytest --accept`` writes)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import zoo
from sparsify.graph_text import graph_text
from tests.contract.zoo_captures import captured

GOLDEN = Path(__file__).parents[2] / "golden"
PIPELINE = "ffn-moe,attn-moh"
MODELS = ("llama", "gpt2", "vit")
Golden = Callable[[str, str], None]


@functools.cache
def compiled(name: str) -> Any:
    return sparsify.compile(captured(name), PIPELINE, reproducer=None)


@pytest.mark.parametrize("name", MODELS)
def test_graph(name: str, golden: Golden) -> None:
    golden(f"{name}/{PIPELINE}.graph.txt", graph_text(compiled(name).graph))


@pytest.mark.parametrize("name", MODELS)
def test_report(name: str, golden: Golden) -> None:
    golden(f"{name}/{PIPELINE}.report.txt", compiled(name).report.golden())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_outputs(name: str, golden: Golden) -> None:
    """Some of the first output's numbers, dense and at half the budget."""
    model = compiled(name)
    lines = []
    for active in (1.0, 0.5):
        model.set_active(active)
        first = model.graph(*model.example)[0]
        for row in first.flatten(0, -2)[::4].tolist():
            lines.append(" ".join(f"{round(v, 4) + 0.0:9.4f}" for v in (active, *row[:8])))
    model.set_active(1.0)
    file = f"{name}/{PIPELINE}.outputs.txt"
    golden(file, settled("\n".join(lines), GOLDEN / file))


def settled(text: str, file: Path) -> str:
    """The file's text where all numbers agree to 2e-4: the last digit is the machine's."""
    if not file.exists():
        return text
    known = file.read_text()
    old, new = ([float(word) for word in t.split()] for t in (known, text))
    near = len(old) == len(new) and all(abs(a - b) <= 2e-4 for a, b in zip(old, new, strict=True))
    return known if near else text


def test_inspect_of_a_model_with_near_misses_only(golden: Golden) -> None:
    made = zoo.build("conv")
    shown = sparsify.inspect(made.model, made.example).text(0)
    # line numbers move
    golden("conv/inspect.txt", re.sub(r"\.py:\d+", ".py", shown))
