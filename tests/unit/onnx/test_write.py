"""Files written whole or not at all, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsify.codegen.onnx import write as writer
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.targets import check
from sparsify.codegen.onnx.write import check_folder, is_folder, write
from sparsify.errors import BadInput, MissingDependency, OutputError

ir = pytest.importorskip("onnx_ir")


def model(size: int = 1000) -> Any:
    """y = x + w, with w of ``size`` numbers."""
    x = ir.Value(name="x", shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(np.arange(size, dtype=np.float32), name="w"))
    node = ir.node("Add", [x, w])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file_or_two(tmp_path: Path) -> None:
    one = write(model(), tmp_path / "a.onnx", external=None, force=False)
    two = write(model(), tmp_path / "b.onnx", external=True, force=False)
    assert names(tmp_path) == ["a.onnx", "b.onnx", "b.onnx.data"]
    assert [f.name for f in one] == ["a.onnx"]
    assert sorted(f.name for f in two) == ["b.onnx", "b.onnx.data"]
    for file in ("a.onnx", "b.onnx"):
        tensor = ir.load(tmp_path / file).graph.initializers["w"].const_value
        assert np.array_equal(tensor.numpy(), np.arange(1000, dtype=np.float32))
    assert (tmp_path / "b.onnx").stat().st_size < 1000


def test_replacing_needs_force_and_leaves_no_stale_weights(tmp_path: Path) -> None:
    place = tmp_path / "a.onnx"
    write(model(), place, external=True, force=False)
    with pytest.raises(OutputError, match="exists already"):
        write(model(), place, external=None, force=False)
    write(model(10), place, external=None, force=True)
    assert names(tmp_path) == ["a.onnx"]


def test_above_the_limit_weights_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of 2 GiB, brought down to 4,000 bytes; weights of branches count, too."""
    monkeypatch.setattr(writer, "LIMIT", 4000)
    one = write(model(1000), tmp_path / "small.onnx", external=None, force=False)
    two = write(model(1001), tmp_path / "large.onnx", external=None, force=False)
    assert (len(one), len(two)) == (1, 2)
    with pytest.raises(OutputError, match="a single ONNX file holds 2 GiB at most"):
        write(model(1001), tmp_path / "c.onnx", external=False, force=False)
    assert names(tmp_path) == ["large.onnx", "large.onnx.data", "small.onnx"]
    made = model(500)
    weight = ir.Value(name="v", const_value=ir.tensor(np.zeros(600, np.float32), name="v"))
    branch = ir.Graph((), [weight], nodes=[], initializers=[weight], name="b")
    choose = ir.node("If", [made.graph.inputs[0]], {"then_branch": branch})
    made.graph.append(choose)
    with pytest.raises(OutputError, match="holds 2 GiB"):
        write(made, tmp_path / "c.onnx", external=False, force=False)


def test_what_is_tied_is_written_once_and_moves_with_its_folder(tmp_path: Path) -> None:
    """Two readers of one weight; the pair is loaded from where the folder went."""
    ort = pytest.importorskip("onnxruntime")
    made = model(1000)
    x, w = made.graph.inputs[0], made.graph.initializers["w"]
    again = ir.node("Mul", [made.graph.outputs[0], w])
    again.outputs[0].name = "z"
    made.graph.append(again)
    made.graph.outputs[:] = [again.outputs[0]]
    again.outputs[0].shape, again.outputs[0].type = x.shape, x.type
    (tmp_path / "first").mkdir()
    files = write(made, tmp_path / "first" / "a.onnx", external=True, force=False)
    assert files[1].stat().st_size == 4000
    (tmp_path / "first").rename(tmp_path / "second")
    running = ort.InferenceSession(
        tmp_path / "second" / "a.onnx", providers=["CPUExecutionProvider"]
    )
    one = np.ones(1000, np.float32)
    weight = np.arange(1000, dtype=np.float32)
    assert np.array_equal(running.run(None, {"x": one})[0], (one + weight) * weight)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("renames", [1, 2, 3])
def test_an_error_between_the_two_files_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, before: bool
) -> None:
    """Files are renamed one after the other; the old pair, or the old file alone, comes back."""
    place = tmp_path / "a.onnx"
    write(model(1000), place, external=before, force=False)
    kept = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    real, count = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += self.parent != tmp_path
        if count == renames and not self.name.endswith(".old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    if renames == 3:  # all went well
        write(model(2000), place, external=True, force=True)
        assert (tmp_path / "a.onnx.data").stat().st_size == 8000
        return
    with pytest.raises(OutputError, match="Input/output error"):
        write(model(2000), place, external=True, force=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == kept


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    assert is_folder("new/") and is_folder(tmp_path) and not is_folder("a.onnx")
    check_folder(tmp_path / "new", force=False)
    for name, force, says in (
        ("taken", False, "is not empty"),
        ("taken", True, "holds no model.onnx, so it is not replaced"),
        ("file", True, "is a file"),
        ("none/new", True, "is not there"),
    ):
        with pytest.raises(OutputError, match=says):
            check_folder(tmp_path / name, force=force)
    (tmp_path / "taken" / "model.onnx").write_text("old")
    check_folder(tmp_path / "taken", force=True)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("", "is a folder"),
        ("none/a.onnx", "is not there"),
        ("file/a.onnx", "is not a folder"),
    ],
)
def test_places_that_cannot_be(tmp_path: Path, place: str, says: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match=says):
        write(model(), tmp_path / place, external=None, force=True)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not writable"):
            write(model(), tmp_path / "a.onnx", external=None, force=False)
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.onnx"
    write(model(), place, external=True, force=False)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def half(made: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ir, "save", half)
    with pytest.raises(OutputError, match="No space left"):
        write(model(), place, external=True, force=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


FULL = """
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.unit.onnx.test_write import model
from sparsify.codegen.onnx.write import write
from sparsify.errors import OutputError
for external in (False, True):
    try:
        write(model(100_000), Path(sys.argv[1]) / "a.onnx", external=external, force=False)
    except OutputError as error:
        print(error.what, "|", error.why)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_small_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        root = Path(__file__).parents[3]
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(tmp_path), str(root)],
            capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        left = names(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("| No space left on device") for line in lines)
    assert left == []


@pytest.mark.parametrize("opset", [1, 17, 99, True])
def test_opsets_that_cannot_be_written(opset: int) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        check("portable", "mask", opset)


def test_targets_and_routings_by_name() -> None:
    assert check("portable", "mask", None, "int8") == 20
    assert check("portable", "mask", None, "int4") == 21
    with pytest.raises(BadInput, match="did you mean 'float16'"):
        check("portable", "mask", None, "flaot16")
    with pytest.raises(BadInput, match="no weights in 4 bits"):
        check("portable", "mask", 18, "int4")
    assert check("portable", "branch", None) == 20
    with pytest.raises(BadInput, match="did you mean 'portable'"):
        check("potable", "mask", None)
    with pytest.raises(BadInput, match="one of: mask, branch"):
        check("portable", "x", None)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"sparsify-fx\[onnx\]"):
        need("onnx", "onnxscript")
