"""Selections of a file beside the model's: named, counted, and judged where they differ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.codegen.onnx import parity, selections, trace
from sparsify.codegen.onnx.case import RELATIVE, Agreement, Case
from sparsify.codegen.onnx.selections import marked, recorded
from sparsify.codegen.onnx.trial_calls import without_padding
from sparsify.runtime.router import Router
from tests.unit.onnx.models import llama, llama_translated

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
ROUTER = "model.layers.0.mlp.moe.router"
APART = 1e-6


@pytest.fixture(scope="module")
def rivals() -> tuple[Any, Any, Any]:
    """zoo:llama with units of one router that score the same but for ``APART``; its forms; both
    as an ``onnx_ir.Model``."""
    model = copy.deepcopy(llama())
    router, made = model.graph.get_submodule(ROUTER), llama_translated(20)
    (weight,) = (  # the file holds it transposed
        value for value in made.graph.initializers.values()
        if np.array_equal(value.const_value.numpy(), router.weight.detach().numpy().T)
    )  # fmt: skip
    bias = made.graph.initializers[f"{ROUTER}.bias"]
    with torch.no_grad():
        router.weight[1::2] = router.weight[:-1:2]
        router.bias[1::2] = router.bias[:-1:2] - APART
    for value, own in ((weight, router.weight.detach().T), (bias, router.bias.detach())):
        value.const_value = ir.tensor(own.contiguous().numpy(), name=value.name)
    return model, trace.formed(model), made


def compared(rivals: tuple[Any, Any, Any], folder: Path, shift: float) -> tuple[Case, ...]:
    """The file, with ``shift`` added to the scores of every second unit, beside the model."""
    model, graph, made = rivals
    made = made.clone()
    bias = made.graph.initializers[f"{ROUTER}.bias"]
    values = np.array(bias.const_value.numpy())
    values[1::2] += shift
    bias.const_value = ir.tensor(values, name=bias.name)
    ir.save(made, folder / "a.onnx")
    return parity.compare(model, graph, folder / "a.onnx")


def test_selections_are_named_and_the_same(tmp_path: Path) -> None:
    made = llama_translated(20)
    ir.save(made, tmp_path / "a.onnx")
    model = llama()
    found = parity.compare(model, trace.formed(model), tmp_path / "a.onnx")
    layers = [
        f"model.layers.{i}.{part}.router.live" for i in (0, 1) for part in ("mlp.moe", "self_attn")
    ]
    running = parity.session(tmp_path / "a.onnx", watched=True)
    outputs = [value.name for value in running.get_outputs()]
    assert sorted(outputs[-4:]) == layers
    assert outputs[:-4] == [v.name for v in parity.session(tmp_path / "a.onnx").get_outputs()]
    units = 2 * (3 + 9)  # of heads and experts, as routers score them
    tokens = {"example": 14, "prefill": 9, "batch": 27, "left padding": 25, "decode": 3}
    assert {c.name: c.selection.decisions for c in found if c.selection} == {
        name: count * units for name, count in tokens.items()
    }
    assert all(c.ok and c.selection and c.selection.same == 1 for c in found)
    assert "same selection" in found[0].text()


def test_ties_are_no_error(rivals: tuple[Any, Any, Any], tmp_path: Path) -> None:
    found = compared(rivals, tmp_path, 2 * APART)
    differing = [case for case in found if case.selection and case.selection.differ]
    assert max(case.relative for case in differing) > RELATIVE  # other units, other outputs
    for case in differing:
        assert case.selection is not None
        assert case.ok
        assert case.selection.ties
        assert case.selection.relative is not None
        assert case.selection.relative <= RELATIVE
        assert "at ties" in case.text()


def test_other_units_than_ties_are_an_error(rivals: tuple[Any, Any, Any], tmp_path: Path) -> None:
    found = compared(rivals, tmp_path, 0.5)
    worst = max(found, key=lambda case: case.relative)
    assert not worst.ok
    assert worst.selection is not None
    assert worst.selection.untied[0] == f"{ROUTER}.live"
    assert worst.selection.relative is not None
    assert worst.selection.relative <= RELATIVE  # with the file's units, the rest is right
    assert f"not at a tie in {ROUTER}.live" in worst.text()


def test_ties_excuse_no_other_error() -> None:
    near = Agreement(100, 1, (), 1e-5)
    assert Case("decode", 1.0, 1.0, selection=near).ok
    assert not Case("decode", 1.0, 1.0, selection=Agreement(100, 1, (), 1e-2)).ok
    assert not Case("decode", 1.0, 1.0, selection=Agreement(100, 1, ("router",), 1e-5)).ok
    assert not Case("decode", 1.0, 1.0, selection=Agreement(100, 0)).ok


def test_every_call_of_a_router_has_a_name() -> None:
    module = torch.nn.Module()
    module.router = Router(torch.eye(4), active=0.5)
    x = torch.tensor([[4.0, 3, 2, 1]])
    with recorded(module) as record, torch.no_grad():
        module.router(x)
        module.router(-x)
    assert {name: mask.int().tolist() for name, mask in record.masks.items()} == {
        "router.live": [[1, 1, 0, 0]], "router.live.1": [[0, 0, 1, 1]],
    }  # fmt: skip
    given = {"router.live": torch.tensor([[True, False, True, False]])}
    with recorded(module, given, tie=0.1) as record, torch.no_grad():
        assert module.router(x).tolist() == [[1, 0, 1, 0]]
    assert record.untied == ["router.live"]
    with recorded(module, given, tie=0.2) as record, torch.no_grad():
        module.router(x)
    assert record.untied == []
    assert "live" not in vars(module.router)


def test_padding_does_not_count() -> None:
    model = llama()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    seen = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])  # one token in the cache
    for shape in ((2, 3, 5), (6, 5), (2, 7, 3, 5)):
        selection = torch.zeros(shape, dtype=torch.bool)
        assert without_padding(model, [ids, seen], selection).numel() == selection.numel() * 5 // 6


def test_marks_are_gone_after_tracing() -> None:
    graph = trace.formed(llama())
    with marked(graph):
        assert "live" in vars(graph.get_submodule(ROUTER))
    assert "live" not in vars(graph.get_submodule(ROUTER))
    made = llama_translated(20)
    assert {node.domain for node in made.graph} == {""}
    assert selections.DOMAIN not in made.opset_imports
