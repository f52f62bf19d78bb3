"""Folders for clients: what is in them, and that onnxruntime-genai decodes from one."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.codegen.onnx import export as exporting
from sparsify.codegen.onnx import parity, trace, translate
from sparsify.codegen.onnx.client_files import genai_config
from sparsify.errors import OutputError
from tests.unit.onnx.models import llama, llama_translated

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is traced and translated once for all tests."""
    monkeypatch.setattr(trace, "traced", lambda graph, model: None)
    monkeypatch.setattr(
        translate, "translated", lambda program, call, opset, *target: llama_translated(opset)
    )


@pytest.mark.usefixtures("quick")
def test_a_folder_has_what_clients_read(tmp_path: Path) -> None:
    found = llama().export(f"{tmp_path}/served/", external_data=True)
    place = tmp_path / "served"
    assert found.files == (place / "model.onnx", place / "model.onnx.data")
    assert found.beside == ("config.json", "genai_config.json", "generation_config.json")
    assert sorted(file.name for file in place.iterdir()) == sorted(
        [*found.beside, *(file.name for file in found.files)]
    )
    assert "beside it: config.json, genai_config.json, generation_config.json" in found.text()
    config = json.loads((place / "config.json").read_text())
    assert "auto_map" not in config and config["dtype"] == "float32"
    said = json.loads((place / "genai_config.json").read_text())["model"]
    decoder = said["decoder"]
    graph = ir.load(place / "model.onnx").graph
    asked = [decoder["inputs"][n] for n in ("input_ids", "attention_mask", "position_ids")]
    for part in ("past_key_names", "past_value_names"):
        asked += [decoder["inputs"][part].replace("%d", str(n)) for n in range(2)]
    assert sorted(asked) == sorted(value.name for value in graph.inputs)
    given = [decoder["outputs"]["logits"]]
    for part in ("present_key_names", "present_value_names"):
        given += [decoder["outputs"][part].replace("%d", str(n)) for n in range(2)]
    assert sorted(given) == sorted(value.name for value in graph.outputs)
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (8, 2)
    assert parity.greedy(parity.session(place / "model.onnx"), *_prompt())[0] == _expected()


def _prompt() -> tuple[Any, int]:
    return torch.tensor([[5, 17, 99]]).numpy(), 8


def _expected() -> list[int]:
    ids = torch.from_numpy(_prompt()[0])
    found: list[int] = llama().generate(ids, max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    return found


@pytest.mark.usefixtures("quick")
def test_a_folder_is_replaced_whole_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "served"
    place.mkdir()
    llama().export(place, check=False)  # empty: a folder is meant
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(OutputError, match="is not empty"):
        llama().export(place)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.client_files, "write_json", fail)
    with pytest.raises(OutputError, match="No space left"):
        llama().export(place, check=False, force=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["served"]


def test_what_genai_cannot_run_gets_no_file_of_its() -> None:
    model = llama()
    call = model.call_spec
    assert genai_config(model) is not None
    for layers in ((), ((2, 8, 8), (1, 8, 8)), ((2, 8, 4), (2, 8, 4))):
        object.__setattr__(call, "layers", layers)
        try:
            assert genai_config(model) is None
        finally:
            object.__setattr__(call, "layers", ((2, 8, 8), (2, 8, 8)))


GENAI = """
import sys, numpy as np, onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
rows = [[5, 17, 99, 3], [9, 8, 0, 0]]  # it pads on the right
asked = genai.GeneratorParams(model)
asked.set_search_options(max_length=14, min_length=14, batch_size=2)
running = genai.Generator(model, asked)
running.append_tokens(np.array(rows, dtype=np.int32))
while not running.is_done():
    running.generate_next_token()
for row in range(2):
    print(*running.get_sequence(row)[4:])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_onnxruntime_genai_decodes_a_batch(tmp_path: Path) -> None:
    """In a virtual environment of its own; skipped where pip cannot install it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "onnxruntime-genai"]
    if subprocess.run(install, capture_output=True, check=False, timeout=300).returncode:
        pytest.skip("pip cannot install onnxruntime-genai here")
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for name in ("onnxruntime", "numpy", "numpy.libs", "google", "flatbuffers", "packaging"):
        source = Path(sysconfig.get_paths()["purelib"]) / name
        if source.exists() and not (site / name).exists():
            (site / name).symlink_to(source)
    llama().export(f"{tmp_path}/served/")
    done = subprocess.run(
        [python, "-c", GENAI, tmp_path / "served"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    for tokens, prompt in zip(found, ([5, 17, 99, 3], [9, 8]), strict=True):
        model = llama()
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, min_new_tokens=10, do_sample=False
        )
        assert tokens == expected[0, len(prompt) :].tolist()
