"""The matrix in benchmarks/results/ONNX.md: it is what its JSON says, and a sample holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sparsify import registry, zoo
from tests.contract.zoo_captures import captured

pytest.importorskip("onnxruntime")


@pytest.fixture
def matrix(bench: Callable[[str], Any]) -> Any:
    """The script as a module."""
    return bench("onnx_matrix")


def test_the_page_is_what_was_measured(matrix: Any) -> None:
    cells = json.loads(matrix.RESULTS.read_text())
    assert matrix.TABLE.read_text() == matrix.table(cells)
    assert set(cells) == {f"{n} {work}" for n in zoo.names() for work in registry.names()}
    for cell in cells.values():
        assert cell.get("left") or cell.get("refused") or cell["error"] <= 1e-4


@pytest.mark.parametrize(
    ("name", "work"),
    [
        pytest.param("nanogpt", "hidden-route", marks=pytest.mark.slow),
        ("nanogpt", "depth-mod"),
        pytest.param("llama", "depth-mor", marks=pytest.mark.slow),
        pytest.param("llama", "attn-moba", marks=pytest.mark.slow),
        pytest.param("vit", "ffn-bits", marks=pytest.mark.slow),
        pytest.param("dit", "ffn-mode", marks=pytest.mark.slow),
        pytest.param("t5", "attn-moh", marks=pytest.mark.slow),
    ],
)
def test_a_sample_of_it_holds(matrix: Any, name: str, work: str) -> None:
    cell = matrix.cell(captured(name), work)
    assert cell["error"] <= 1e-4
