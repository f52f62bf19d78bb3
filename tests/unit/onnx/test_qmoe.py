"""Experts in codes: ONNX Runtime's QMoE instead of its MoE, with the values of the codes."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsify.codegen.onnx import export as exporting
from sparsify.codegen.onnx import parity, qmoe, rounded, targets, trace, translate, weights
from sparsify.codegen.onnx.codes_in_graph import put_codes
from sparsify.codegen.onnx.weights import planned, put_values
from tests.unit.onnx.models import llama

ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
_traced, _translated = trace.traced, translate.translated  # tests replace them
EXPERTS, TOKENS = 4, 5
GATED = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}


class Held(nn.Module):
    """A module that holds the weights of a graph by name."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        super().__init__()
        for name, array in arrays.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(array), False))


def layer(
    activation: str = "swiglu", width: int = 64, hidden: int = 24, *, bias: bool = False,
    twice: bool = False,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A graph of one or two MoE operators on the same stacks, and the stacks."""
    rng = np.random.default_rng(0)
    rows = hidden * (2 if activation == "swiglu" else 1)
    arrays = {
        "a": rng.standard_normal((EXPERTS, rows, width)).astype(np.float32),
        "b": rng.standard_normal((EXPERTS, width, hidden)).astype(np.float32),
    }
    about = {"k": EXPERTS, "activation_type": activation, "normalize_routing_weights": 0}
    about |= GATED if activation == "swiglu" else {}
    make = onnx.helper.make_node
    steps = [("x", "h"), ("h", "y")] if twice else [("x", "y")]
    nodes = [
        make("MoE", [x, "logits", "a", "c" * bias, "b"], [y], domain="com.microsoft", **about)
        for x, y in steps
    ]
    x, logits, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["t", size])
        for name, size in (("x", width), ("logits", EXPERTS), ("y", width))
    )
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x, logits], [y]), ir_version=10,
        opset_imports=[onnx.helper.make_opsetid(*d) for d in (("", 21), ("com.microsoft", 1))],
    )  # fmt: skip
    held = {**arrays, "c": rng.standard_normal((EXPERTS, rows)).astype(np.float32)}
    for name in held if bias else arrays:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(held[name], name))
    return ir.serde.deserialize_model(proto), arrays


def run(model: Any, folder: Path, *, float32: bool = True) -> Any:
    rng = np.random.default_rng(1)
    width = int(model.graph.inputs[0].shape[1])
    logits = np.zeros((TOKENS, EXPERTS), np.float32)
    logits[:, 1], logits[2] = -1e9, [-1e9, 0, -2e9, 0.5]
    ir.save(model, folder / "a.onnx")
    running = parity.session(folder / "a.onnx", float32=float32)
    x = rng.standard_normal((TOKENS, width)).astype(np.float32)
    return running.run(None, {"x": x, "logits": logits})[0]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "options",
    [
        {},  # 24 neurons: 8 are added
        {"bias": True},
        {"hidden": 64, "width": 96},
        {"activation": "gelu"},
        {"activation": "silu", "bias": True},
        {"activation": "relu", "hidden": 32},
        {"activation": "identity"},
        {"twice": True},
    ],
    ids=str,
)
def test_codes_give_what_their_values_give(
    precision: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, arrays = layer(**options)
    plain = run(model, tmp_path)
    plans, told = planned(model, precision, Held(arrays))
    assert told.stored == {precision: 2}
    put_values(plans)
    expected = run(model, tmp_path)
    put_codes(model, plans)
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["QMoE"] * (2 if options.get("twice") else 1)
    assert not {"a", "b"} & set(model.graph.initializers)
    scale = np.abs(expected).max()
    assert np.abs(run(model, tmp_path) - expected).max() <= 1e-5 * scale
    assert 0 < np.abs(expected - plain).max() < (0.05 if precision == "int8" else 0.5) * scale
    fast = np.abs(run(model, tmp_path, float32=False) - expected).max()
    assert 1e-4 * scale < fast < 0.1 * scale  # activations in 8 bits; the variable is reset
    assert qmoe.VARIABLE not in os.environ


def test_files_are_as_small_as_codes(tmp_path: Path) -> None:
    """A quarter and an eighth of the floats, and the scales."""
    whole = layer(width=256, hidden=256)[1]
    floats = sum(array.nbytes for array in whole.values())
    for precision, share in (("int8", 1 / 4 + 1 / 256), ("int4", 1 / 8 + 1 / 32)):
        model, arrays = layer(width=256, hidden=256)
        put_codes(model, planned(model, precision, Held(arrays))[0])
        ir.save(model, tmp_path / "a.onnx")
        assert (tmp_path / "a.onnx").stat().st_size < floats * share + 4096


def test_what_is_no_whole_blocks_stays_and_is_told(tmp_path: Path) -> None:
    for precision, width in (("int4", 48), ("int8", 40)):
        model, arrays = layer(width=width)
        plans, told = planned(model, precision, Held(arrays))
        assert plans == [] and told.left == {"of MoE, whose inputs are no whole blocks": 2}
    model, arrays = layer(width=48)
    assert planned(model, "int8", Held(arrays))[1].stored == {"int8": 2}


def test_both_stacks_or_none() -> None:
    model, arrays = layer()
    plans, told = planned(model, "int4", Held({"a": arrays["a"]}))
    assert plans == [] and told.left == {"made by the exporter": 1, "of MoE": 1}


def test_stacks_in_half_precision_are_widened_for_the_operator(tmp_path: Path) -> None:
    model, arrays = layer()
    plans, told = planned(model, "float16", Held(arrays))
    assert told.stored == {"float16": 2}
    put_values(plans)
    expected = run(model, tmp_path)
    put_codes(model, plans)
    assert [node.op_type for node in model.graph] == ["Cast", "Cast", "MoE"]
    assert np.array_equal(run(model, tmp_path), expected)


def test_a_variable_that_was_set_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(qmoe.VARIABLE, "0")
    with qmoe.in_float32():
        assert os.environ[qmoe.VARIABLE] == "fp32"
    assert os.environ[qmoe.VARIABLE] == "0"


@functools.cache
def translated() -> Any:
    """The model with experts as MoE."""
    model = llama()
    program = _traced(trace.formed(model, "moe"), model)
    return _translated(program, model.call_spec, targets.OPSET_ORT, "ort")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_model_whose_experts_are_codes(
    precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights, "LEAST", 64)
    monkeypatch.setattr(exporting.trace, "traced", lambda graph, model: None)
    monkeypatch.setattr(translate, "translated", lambda *given: translated().clone())
    found = llama().export(tmp_path / "a.onnx", target="ort", routing="moe", weights=precision)
    assert found.operators["QMoE"] == 2 and "MoE" not in found.operators
    assert set(found.weights.left) == {"of routers", "small"}
    held = [case for case in found.cases if case.held]
    assert {case.against for case in held} == {"model", rounded.SAME}
    assert all(case.relative <= 1e-4 for case in held)
