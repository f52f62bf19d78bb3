"""Exported files: names, sizes, weights once, the same numbers; and running without torch."""

from __future__ import annotations

import copy
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.codegen.onnx import export as exporting
from sparsify.codegen.onnx import parity, trace, trial_calls
from sparsify.codegen.onnx.case import Case
from sparsify.core import Refused
from sparsify.errors import NotExported, OutputError, ParityFailed
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.lora import LoRA
from tests.unit.onnx.models import agrees_by_the_standard, llama

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """zoo:llama, half active, and what the export said of it."""
    place = tmp_path_factory.mktemp("onnx") / "llama.onnx"
    return place, llama().export(place)


def test_parity_is_reported_and_held(file: tuple[Path, Any]) -> None:
    _, found = file
    assert [case.name for case in found.cases] == [
        "example", "prefill", "batch", "left padding", "decode",
    ]  # fmt: skip
    assert all(case.ok and case.same == 1 for case in found.cases)
    assert set(found.active.values()) == {0.5}
    assert found.text().count("ok ") == 5
    assert found.forms == {
        "RoutedRows by masks": 2, "RoutedAttend by masks": 2, "RoutedColumns by masks": 2,
        "RoutedFFN by masks": 2,
    }  # fmt: skip


def test_names_and_sizes_are_optimums(file: tuple[Path, Any]) -> None:
    graph = ir.load(file[0]).graph
    shapes = {v.name: [str(d) for d in v.shape] for v in (*graph.inputs, *graph.outputs)}
    batch, tokens, past = "batch_size", "sequence_length", "past_sequence_length"
    whole = f"{past} + {tokens}"
    assert shapes == {
        "input_ids": [batch, tokens],
        "attention_mask": [batch, whole],
        "position_ids": [batch, tokens],
        **{f"past_key_values.{i}.{p}": [batch, "2", past, "8"]
           for i in (0, 1) for p in ("key", "value")},
        "logits": [batch, tokens, "128"],
        **{f"present.{i}.{p}": [batch, "2", whole, "8"] for i in (0, 1) for p in ("key", "value")},
    }  # fmt: skip


def test_only_the_standard_and_nothing_twice(file: tuple[Path, Any]) -> None:
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(file[0]), full_check=True)
    model = ir.load(file[0])
    assert set(model.opset_imports) == {""}
    weights = sum(p.numel() for p in llama().parameters())
    stored = sum(v.const_value.size for v in model.graph.initializers.values())
    assert stored < 1.1 * weights + 2000


def test_onnxs_own_evaluator_agrees(file: tuple[Path, Any]) -> None:
    assert agrees_by_the_standard(file[0], llama(), trial_calls.cases(llama())[1][1])


def test_generation_equals_eagers(file: tuple[Path, Any]) -> None:
    model, running = llama(), parity.session(file[0])
    prompt = torch.tensor([[5, 17, 99, 3]])
    expected = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, 4:].tolist()
    assert parity.greedy(running, prompt.numpy(), 16)[0] == expected


ALONE = """
import sys, numpy as np, onnxruntime as ort
for absent in ("torch", "sparsify", "transformers", "onnx", "onnx_ir", "onnxscript"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{absent} is here")
run = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
past = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32)
        for v in run.get_inputs() if v.name.startswith("past")}
outputs = [v.name for v in run.get_outputs()]
ids, seen, logits, tokens = np.array([[5, 17, 99]]), 0, [], []
while len(tokens) < 8:
    seen += ids.shape[1]
    feed = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(seen - ids.shape[1], seen)[None], **past}
    found = dict(zip(outputs, run.run(None, feed)))
    past = {name: found[name.replace("past_key_values", "present")] for name in past}
    logits.append(found["logits"])
    tokens.append(int(found["logits"][0, -1].argmax()))
    ids = np.array([[tokens[-1]]])
np.save(sys.argv[2], np.concatenate(logits, 1))
print(*tokens)
"""
RUNTIME = ("onnxruntime", "numpy", "numpy.libs", "google", "flatbuffers", "packaging")


def test_decodes_with_onnxruntime_alone(file: tuple[Path, Any], tmp_path: Path) -> None:
    """In a virtual environment of its own, which holds onnxruntime and what it needs: the prompt,
    then seven tokens with the file's cache."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for name in RUNTIME:
        source = Path(sysconfig.get_paths()["purelib"]) / name
        if source.exists():
            (site / name).symlink_to(source)
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-c", ALONE, file[0], tmp_path / "logits.npy"],
        capture_output=True, text=True, env={}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = [int(word) for word in done.stdout.split()]
    prompt = torch.tensor([[5, 17, 99]])
    expected = llama().generate(prompt, max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    assert tokens == expected
    whole = torch.cat([prompt, torch.tensor([tokens[:-1]])], 1)
    with torch.no_grad():
        eager = llama()(input_ids=whole).logits.numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - eager).max() <= 1e-4 * np.abs(eager).max()


# ---------------------------------------------------------------------------- refusals


def test_nothing_is_traced_for_a_place_that_is_taken(
    file: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "formed", lambda *_: pytest.fail("traced"))
    with pytest.raises(OutputError, match="exists already"):
        llama().export(file[0])


def test_what_has_no_form_is_refused_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sparsify.codegen.onnx import forms

    def refuse(module: Any, way: str) -> None:
        if isinstance(module, RoutedFFN):
            raise Refused("its experts are elsewhere", suggestion="fetch them")

    monkeypatch.setattr(forms, "_into_form", refuse)
    with pytest.raises(NotExported) as caught:
        llama().export(tmp_path / "a.onnx")
    said = caught.value
    assert said.what == "the RoutedFFN at model.layers.0.mlp.moe cannot be exported"
    assert (said.why, said.help) == ("its experts are elsewhere", "fetch them")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["branch", "moe", "custom"])
def test_a_form_is_told_as_it_is_written(way: str) -> None:
    """Projections have not all the ways that feed-forward layers have."""
    found = trace.told(trace.formed(llama(), way))
    columns = trace.HOW["custom" if way == "custom" else "mask"]
    assert found[f"RoutedColumns {columns}"] == found["RoutedRows by masks"] == 2
    assert found[f"RoutedFFN {trace.HOW[way]}"] == 2


def test_adapters_are_to_be_merged_first() -> None:
    model = copy.deepcopy(llama())
    ffn = next(m for m in model.modules() if isinstance(m, RoutedFFN))
    torch.nn.utils.parametrize.register_parametrization(ffn, "up", LoRA(ffn.up, 2, 4.0))
    with pytest.raises(NotExported, match="merge"):
        trace.formed(model)


def test_a_file_that_differs_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, made = object(), ir.load
    case = Case("decode", 0.1, 1.0)
    monkeypatch.setattr(exporting.trace, "traced", lambda graph, model: program)
    monkeypatch.setattr(exporting.translate, "translated", lambda *_: empty())
    monkeypatch.setattr(exporting.parity, "compare", lambda *_: (case,))
    (tmp_path / "a.onnx").write_text("the file before")
    with pytest.raises(ParityFailed, match="decode"):
        llama().export(tmp_path / "a.onnx", force=True)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the file before"]
    (tmp_path / "a.onnx").unlink()
    assert llama().export(tmp_path / "a.onnx", check=False).cases == ()
    assert made(tmp_path / "a.onnx").metadata_props["sparsify.pipeline"] == llama().pipeline


def empty() -> Any:
    from tests.unit.onnx.test_write import model

    return model(4)


def test_the_model_is_as_it_was(file: tuple[Path, Any]) -> None:
    model = llama()
    kinds = {type(m) for m in model.modules()}
    assert RoutedFFN in kinds
    assert not any("codegen.onnx" in kind.__module__ for kind in kinds)
    model.reset_counters()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert all(0 < live < 1 for live in model.realised().values())
