"""Experts in branches: the same numbers, and what is dead is in no computation."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify.codegen.onnx import parity, weights
from tests.contract.zoo_captures import captured

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
EXPERTS = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sparsify.compile(
            captured("nanogpt"), f"ffn-moe{{experts={EXPERTS}}}", reproducer=None
        )
    model.set_active(0.5)
    place = tmp_path_factory.mktemp("branches") / "nanogpt.onnx"
    found = model.export(place, routing="branch")
    assert found.operators["If"] == 2 * EXPERTS
    return model, place


def test_matrix_products_of_experts_are_in_branches_only(exported: tuple[Any, Path]) -> None:
    graph = ir.load(exported[1]).graph
    outside = [n for n in graph if n.op_type in ("MatMul", "Gemm")]
    weights = {v.name for n in outside for v in n.inputs if v is not None}
    assert not any(".moe.up" in name or ".moe.down" in name for name in weights)
    for node in graph:
        if node.op_type == "If":
            inner = [n.op_type for n in node.attributes["then_branch"].value]
            assert inner.count("MatMul") + inner.count("Gemm") == 2
            assert [n.op_type for n in node.attributes["else_branch"].value] == ["Identity"]


def test_dead_experts_are_not_read(exported: tuple[Any, Path], tmp_path: Path) -> None:
    """With NaN for weights, an expert that no token uses changes nothing."""
    model, place = exported
    flat = [t[:1, :1].clone() if t.dim() == 2 else t[:1] for t in model.example]
    with torch.no_grad():
        expected = model.graph(*flat)[0]
        router = next(m for m in model.modules() if type(m).__name__ == "Router")
    file = ir.load(place)
    poisoned = 0
    names = sorted(v for v in file.graph.initializers if re.search(r"\.moe\.down_\d$", v))
    assert len(names) == 2 * EXPERTS and router.units == EXPERTS
    for name in names:
        value = file.graph.initializers[name]
        kept = value.const_value
        value.const_value = ir.tensor(kept.numpy() * float("nan"), name=name)
        ir.save(file, tmp_path / "one.onnx")
        value.const_value = kept
        found = parity.run(
            parity.session(tmp_path / "one.onnx"), parity.input_names(model.call_spec), flat
        )[0]
        if torch.isfinite(found).all():
            poisoned += 1
            assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert poisoned == EXPERTS  # half of the experts of both layers


def test_onnxs_own_evaluator_agrees(exported: tuple[Any, Path]) -> None:
    from onnx.reference import ReferenceEvaluator

    model, place = exported
    names = parity.input_names(model.call_spec)
    feed = {name: t.numpy() for name, t in zip(names, model.example, strict=True)}
    found = torch.from_numpy(ReferenceEvaluator(str(place)).run(None, feed)[0])
    with torch.no_grad():
        expected = model.graph(*model.example)[0]
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_weights_in_four_bits_are_in_branches_too(
    exported: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes lie in the branches that read them: ONNX Runtime fuses nothing across a border."""
    monkeypatch.setattr(weights, "LEAST", 64)
    found = exported[0].export(tmp_path / "a.onnx", routing="branch", weights="int4")
    assert all(case.ok for case in found.cases)
    for node in ir.load(found.files[0]).graph:
        if node.op_type == "If":
            branch = node.attributes["then_branch"].value
            assert sum(name.endswith(".codes") for name in branch.initializers) == 2
            assert [n.op_type for n in branch].count("DequantizeLinear") == 2
