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
from tests.unit.onnx.models import agrees_by_the_standard

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
EXPERTS, SHARED = 4, 1
ALONE = EXPERTS - SHARED


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
    assert found.forms == {"RoutedFFN in branches": 2}
    assert found.operators["ScatterND"] == found.operators["GatherND"] == 2 * ALONE
    return model, place


def test_every_expert_computes_its_own_rows(exported: tuple[Any, Path]) -> None:
    graph = ir.load(exported[1]).graph
    readers = [n for n in graph if any(v is not None and ".moe.experts_up_" in v.name and
                                       "bias" not in v.name for v in n.inputs)]  # fmt: skip
    assert len(readers) == 2 * ALONE
    for node in readers:
        rows = node.inputs[0].producer()
        assert rows.op_type == "GatherND" and rows.inputs[1].producer().op_type == "Split"
    for node in graph:  # rows of one scatter are different: see branches.py
        if node.op_type == "ScatterND":
            assert node.inputs[1].producer().op_type == "Split"


def test_weights_are_there_once(exported: tuple[Any, Path]) -> None:
    model, place = exported
    stored = sum(v.const_value.size for v in ir.load(place).graph.initializers.values())
    assert stored < 1.02 * sum(p.numel() for p in model.parameters()) + 2000


def test_onnxs_own_evaluator_agrees(exported: tuple[Any, Path]) -> None:
    """Empty rows are of the standard: its reference implementation takes them."""
    model, place = exported
    assert agrees_by_the_standard(place, model, [t[:1, :1] for t in model.example])


def test_dead_experts_are_not_read(exported: tuple[Any, Path], tmp_path: Path) -> None:
    """With NaN for weights, an expert that no token uses changes nothing."""
    model, place = exported
    flat = [t[:1, :1].clone() if t.dim() == 2 else t[:1] for t in model.example]
    with torch.no_grad():
        expected = model.graph(*flat)[0]
        router = next(m for m in model.modules() if type(m).__name__ == "Router")
    file = ir.load(place)
    poisoned = 0
    names = sorted(v for v in file.graph.initializers if re.search(r"\.experts_down_\d$", v))
    assert len(names) == 2 * ALONE and router.units == EXPERTS and router.shared == SHARED
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
    assert poisoned == EXPERTS  # half of the experts of both layers, shared ones not among them


def test_weights_in_four_bits_of_every_expert(
    exported: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LEAST", 64)
    found = exported[0].export(tmp_path / "a.onnx", routing="branch", weights="int4")
    assert all(case.ok for case in found.cases)
    names = list(ir.load(found.files[0]).graph.initializers)
    coded = [name for name in names if re.search(r"\.experts_(up|gate|down)_\d.*codes$", name)]
    assert len(coded) == 2 * 2 * ALONE  # up and down of two layers
