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

from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.targets import check
from sparsify.codegen.onnx.write import write
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
    assert check("portable", "branch", None) == 20
    with pytest.raises(BadInput, match="did you mean 'portable'"):
        check("potable", "mask", None)
    with pytest.raises(BadInput, match="one of: mask, branch"):
        check("portable", "x", None)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"sparsify-fx\[onnx\]"):
        need("onnx", "onnxscript")
