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


def test_weights_in_four_bits_of_every_expert(
    exported: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LEAST", 64)
    found = exported[0].export(tmp_path / "a.onnx", routing="branch", weights="int4")
    assert all(case.ok for case in found.cases)
    names = list(ir.load(found.files[0]).graph.initializers)
    coded = [name for name in names if re.search(r"\.experts_(up|gate|down)_\d.*codes$", name)]
    assert len(coded) == 2 * 2 * ALONE  # up and down of two layers
