"""Portable files in the standard's reference evaluator: no runtime's own reading of an operator.

Experts by masks with routed heads are in test_export.py, in branches in test_branches.py, weights
in few bits in test_weights.py and test_rounding.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.codegen.onnx import parity
from tests.contract.zoo_captures import captured

reference = pytest.importorskip("onnx.reference")


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
    names = parity.input_names(model.call_spec)
    feed = {name: t.numpy() for name, t in zip(names, model.example, strict=True)}
    found = torch.from_numpy(reference.ReferenceEvaluator(str(file)).run(None, feed)[0])
    with torch.no_grad():
        expected = model.graph(*model.example)[0]
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
