"""Saved models come back the same; damaged folders are refused; nothing is ever half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import BadCheckpoint, BadInput, OutputError
from sparsify.runtime import checkpoint
from sparsify.runtime.checkpoint import load_folder
from sparsify.runtime.graph import attach
from sparsify.runtime.model import SparseModel
from tests.unit.runtime.small import causal, routed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = routed()
    model.report = {"version": "1"}
    model.save(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("make", [causal, routed])
def test_a_model_comes_back_the_same(make: Callable[[], SparseModel], tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "m")
    again = load_folder(tmp_path / "m")
    for mine, golden in zip(again.graph(*again.example), model.golden, strict=True):
        torch.testing.assert_close(mine, golden)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.call_spec == model.call_spec
    assert again.pipeline == model.pipeline
    assert again.graph.code == model.graph.code
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == trained
    assert [p.name for p in (tmp_path).iterdir()] == ["m"]


def test_the_dial_is_saved(tmp_path: Path) -> None:
    model = routed().set_active(0.5)
    model.save(tmp_path / "m")
    again = load_folder(tmp_path / "m")
    assert again.active == model.active
    x = torch.randn(9, 12)
    # Loaded weights are aligned otherwise in memory, which changes the order of sums in BLAS.
    torch.testing.assert_close(again(x)["y"], model(x)["y"])
    again.set_active(1.0)
    torch.testing.assert_close(again(*model.example)["y"], model.golden[0])


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    causal().save(tmp_path / "m")
    with safe_open(tmp_path / "m" / checkpoint.WEIGHTS, "pt") as file:
        assert list(file.keys()) == ["embed.weight"]
    again = load_folder(tmp_path / "m")
    assert again.embed.weight is again.head.weight


def test_views_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    model = routed()
    whole = torch.randn(12, 12)
    attach(model, "spare", whole[:6])
    attach(model, "other", whole[6:])
    model.save(tmp_path / "m")
    again = load_folder(tmp_path / "m")
    assert torch.equal(torch.cat([again.spare, again.other]), whole)


def test_a_moved_model_is_saved_as_it_is_and_moves_back(tmp_path: Path) -> None:
    model = routed().bfloat16()
    model.save(tmp_path / "m")
    again = load_folder(tmp_path / "m")
    assert again.dtype is torch.bfloat16
    x = torch.randn(3, 12)
    torch.testing.assert_close(again(x.bfloat16())["y"], model(x.bfloat16())["y"])
    assert again.float()(x)["y"].dtype is torch.float32


# ---------------------------------------------------------------------------- outputs


def test_an_existing_folder_needs_force(saved: Path) -> None:
    before = (saved / "sparsify.json").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        routed().save(saved)
    assert (saved / "sparsify.json").read_bytes() == before
    causal().save(saved, force=True)
    assert load_folder(saved).kind == "causal-lm"
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_force_replaces_only_saved_models(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not a saved sparse model"):
        routed().save(tmp_path / "mine", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        routed().save(tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    routed().save(tmp_path / "empty")
    assert load_folder(tmp_path / "empty").kind == "module"


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_everything_as_it_was(
    saved: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    target = saved if force else saved.parent / "new"
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(path: Path, data: Any) -> None:
        path.write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(OutputError, match="No space left on device"):
        causal().save(target, force=force)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_a_failed_rename_brings_the_old_one_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError):
        causal().save(saved, force=True)
    assert load_folder(saved).kind == "module"
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        routed().save(tmp_path / "file" / "m")


def test_modules_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    model = routed()
    attach(model, "blocks.0.mlp", nn.Linear(12, 12))
    with pytest.raises(BadInput, match=r"blocks\.0\.mlp"):
        model.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- damage


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "sparsify.json").read_text())
    change(manifest)
    (folder / "sparsify.json").write_text(json.dumps(manifest))


def refused(folder: Path, says: str) -> None:
    with pytest.raises(BadCheckpoint, match=says):
        load_folder(folder)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no folder")
    refused(tmp_path, r"holds no sparsify\.json")


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.GOLDEN, checkpoint.REPORT])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, rf"{name} is missing")


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.GOLDEN])
def test_damaged_weights_are_found(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[-1] ^= 1
    (saved / name).write_bytes(data)
    refused(saved, "SHA-256")
    (saved / name).write_bytes(data[: len(data) // 2])
    refused(saved, "SHA-256")


def test_unreadable_weights_with_a_matching_digest(saved: Path) -> None:
    from sparsify.runtime.files import sha256

    (saved / checkpoint.WEIGHTS).write_bytes(b"\xff" * 100)
    digest = sha256(saved / checkpoint.WEIGHTS)
    edit(saved, lambda m: m["files"].update({checkpoint.WEIGHTS: digest}))
    refused(saved, "is not readable")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "null", "\udcff"])
def test_a_damaged_manifest(saved: Path, text: str) -> None:
    (saved / "sparsify.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadCheckpoint):
        load_folder(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=99), "has format 99, this sparsify reads 1"),
        (lambda m: m["modules"]["blocks.0.mlp"].update({"class": "Evil"}), "Evil"),
        (lambda m: m["modules"].clear(), "reads 'blocks.0.mlp', which is missing"),
        (lambda m: m["tensors"].pop("first.weight"), "first.weight"),
        (lambda m: m["tensors"].update(extra={"kind": "parameter"}), "'extra' is missing"),
        (lambda m: m["files"].update({"../x": ""}), "unknown file"),
        (lambda m: m.pop("call"), "damaged"),
        (lambda m: m["call"].update(kind="odd"), "unknown kind of call"),
        (lambda m: m.pop("graph"), "damaged"),
    ],
)
def test_manifests_that_do_not_fit(saved: Path, change: Callable, says: str) -> None:
    edit(saved, change)
    refused(saved, says)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    from sparsify.runtime.files import sha256

    tensors = load_file(saved / checkpoint.WEIGHTS)
    name = next(n for n in tensors if n.startswith("blocks.0.mlp") and tensors[n].ndim == 3)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, saved / checkpoint.WEIGHTS)
    digest = sha256(saved / checkpoint.WEIGHTS)
    edit(saved, lambda m: m["files"].update({checkpoint.WEIGHTS: digest}))
    refused(saved, "has shape")


def test_loading_needs_torch_and_safetensors_only(saved: Path) -> None:
    code = f"""
import sys
for name in ("transformers", "diffusers", "sparsify.capture", "sparsify.hf", "numpy"):
    if name != "numpy":
        sys.modules[name] = None
from sparsify.runtime.checkpoint import load_folder
model = load_folder({str(saved)!r})
import torch
torch.testing.assert_close(model(*model.example)["y"], model.golden[0])
"""
    root = Path(__file__).resolve().parents[3]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
