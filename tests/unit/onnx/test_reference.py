"""Portable files in the standard's reference evaluator: no runtime's own reading of an operator.

Experts by masks with routed heads are in test_export.py, in branches in test_branches.py, weights
in few bits in test_weights.py and test_rounding.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import sparsify
from tests.contract.zoo_captures import captured
from tests.unit.onnx.models import agrees_by_the_standard

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    "pipeline",
    [
        "hidden-route",
        pytest.param("depth-mod", marks=pytest.mark.slow),
        pytest.param("ffn-moe{experts=4}", marks=pytest.mark.slow),
        pytest.param("attn-moh", marks=pytest.mark.slow),
    ],
)
def test_the_reference_evaluator_agrees_with_eager(pipeline: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sparsify.compile(captured("nanogpt"), pipeline, reproducer=None)
    model.set_active(0.5)
    file = model.export(tmp_path / "a.onnx", check=False).files[0]
    assert agrees_by_the_standard(file, model, model.example)
