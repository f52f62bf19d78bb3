"""Exports with rounded weights: what is proven, what is told, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.codegen.onnx import export as exporting
from sparsify.codegen.onnx import parity, rounded, translate, trial_calls, weights
from sparsify.codegen.onnx.case import Case
from sparsify.errors import BadInput, ParityFailed
from tests.unit.onnx.models import by_the_standard, llama, llama_translated

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
ROUTERS = 4  # one for the heads and one for the experts of each of two layers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a tiny model count as large, and it is translated once for all tests."""
    monkeypatch.setattr(weights, "LEAST", 64)
    monkeypatch.setattr(exporting.trace, "traced", lambda graph, model: None)
    monkeypatch.setattr(
        translate, "translated", lambda program, call, opset, *target: llama_translated(opset)
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("precision", "stored"),
    [
        ("float16", {"float16": 16}),
        ("bfloat16", {"bfloat16": 16}),
        ("int8", {"int8": 16}),
        ("int4", {"int4": 15, "int8": 1}),
    ],
)
def test_rounding_is_all_that_changes(
    precision: str, stored: dict[str, int], tmp_path: Path
) -> None:
    model = llama()
    found = model.export(tmp_path / "a.onnx", weights=precision)
    assert found.opset == (21 if precision == "int4" else 20)
    assert found.weights.stored == stored
    assert found.weights.left["of routers"] == ROUTERS
    assert set(found.weights.left) == {"of routers", "small"}
    groups: dict[str, list[Case]] = {}
    for case in found.cases:
        groups.setdefault(case.against, []).append(case)
    told = [rounded.COSTS] + ([rounded.FAST] if precision.startswith("int") else [])
    assert list(groups) == ["model", rounded.SAME, *told]
    assert all(len(group) == 5 for group in groups.values())
    for against in ("model", rounded.SAME):
        assert all(case.held and case.relative <= 1e-4 for case in groups[against])
    assert any(case.relative > 1e-4 for case in groups[rounded.COSTS])  # told, not judged
    assert all(case.ok and not case.held for case in groups[rounded.COSTS])
    said = found.text()
    assert said.count("ok ") == 6 and "BAD" not in said and rounded.COSTS in said
    data = found.to_dict()
    assert data["weights"]["stored"] == stored
    assert {case["against"] for case in data["parity"]} == set(groups)


@pytest.mark.usefixtures("quick")
def test_the_standards_evaluator_reads_codes(tmp_path: Path) -> None:
    model = llama()
    for precision in ("int8", "int4"):
        file = model.export(tmp_path / f"{precision}.onnx", weights=precision, check=False).files[0]
        names = parity.input_names(model.call_spec)
        flat = trial_calls.cases(model)[-1][1]  # decoding
        (expected, *_) = parity.run(parity.session(file, float32=True), names, flat)
        found = by_the_standard(file, model, flat)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.usefixtures("quick")
def test_codes_that_are_off_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put = rounded.put_codes

    def wrong(made: Any, plans: list[weights.Plan]) -> None:
        put(made, plans)
        name = next(n for n in made.graph.initializers if n.endswith(".scales"))
        value = made.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)

    monkeypatch.setattr(rounded, "put_codes", wrong)
    with pytest.raises(ParityFailed, match="differs from float32 with the same weights"):
        llama().export(tmp_path / "a.onnx", weights="int8")
    assert list(tmp_path.iterdir()) == []
    assert llama().export(tmp_path / "a.onnx", weights="int8", check=False).cases == ()


@pytest.mark.usefixtures("quick")
def test_without_a_check_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity, "session", lambda *a, **k: pytest.fail("ran"))
    found = llama().export(tmp_path / "a.onnx", weights="int4", check=False)
    assert found.cases == () and found.weights.stored["int4"] == 15


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_keep_their_weights_and_compute_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = copy.deepcopy(llama()).to(dtype)
    found = model.export(tmp_path / "a.onnx")
    assert found.weights.stored == {str(dtype).removeprefix("torch."): 12}
    assert all(case.relative <= 1e-4 for case in found.cases)  # rounding costs nothing either
    assert model.dtype == dtype
    wide = copy.deepcopy(model).float()
    flat = trial_calls.cases(wide)[1][1]
    names = parity.input_names(wide.call_spec)
    logits = parity.run(parity.session(found.files[0]), names, flat)[0]
    with torch.no_grad():
        expected = wide.graph(*flat)[0]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(llama()).to(torch.float64)
    for precision in (None, "float16"):
        with pytest.raises(BadInput, match="a float64 model cannot be exported"):
            model.export(tmp_path / "a.onnx", weights=precision)
    assert list(tmp_path.iterdir()) == []


def test_four_bits_need_their_opset(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="opset 20 has no weights in 4 bits") as caught:
        llama().export(tmp_path / "a.onnx", weights="int4", opset=20)
    assert caught.value.help == "--opset 21, or weights in int8"
    with pytest.raises(BadInput, match="did you mean 'int8'"):
        llama().export(tmp_path / "a.onnx", weights="in8")
