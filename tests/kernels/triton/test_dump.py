"""``--emit-triton``: files that import by themselves, whole or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sparsify.cli.entry import main
from sparsify.codegen.triton import dump
from sparsify.errors import NothingRewritten, OutputError
from sparsify.runtime.heads import RoutedRows


def model() -> torch.nn.Module:
    return torch.nn.Sequential(RoutedRows(torch.randn(2, 4, 8)))


def test_files_import_by_themselves(tmp_path: Path) -> None:
    files, left = dump.emit(model(), tmp_path / "kernels")
    assert {f.name for f in files} == {"group_tokens.py", "rows_gemm.py", "rows_gemv.py"}
    assert not left
    assert sorted((tmp_path / "kernels").iterdir()) == files
    for file in files:
        found = importlib.util.spec_from_file_location(f"emitted_{file.stem}", file)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        assert set(module.CONSTANTS) | set(module.SIGNATURE)
        assert "Used by 0." in (module.__doc__ or "")
        assert hasattr(module, file.stem)


def test_what_is_there_is_not_replaced_without_force(tmp_path: Path) -> None:
    (tmp_path / "rows_gemm.py").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        dump.emit(model(), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["rows_gemm.py"]
    dump.emit(model(), tmp_path, force=True)
    assert (tmp_path / "rows_gemm.py").read_text() != "mine"


def test_a_model_without_kernels_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingRewritten, match="no Triton kernel"):
        dump.emit(torch.nn.Linear(2, 2), tmp_path / "kernels")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "kernels"
    words = f"compile zoo:llama -p attn-moh -o {tmp_path}/out --emit-triton {folder}"
    assert main(words.split()) == 2
    assert "cannot write" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_without_triton_the_pip_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "triton" else find(n, *a)
    )
    words = f"compile zoo:llama -p attn-moh -o {tmp_path}/out --emit-triton {tmp_path}/kernels"
    assert main(words.split()) == 2
    assert "pip install 'sparsify-fx[triton]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_compile_emits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = f"compile zoo:llama -p attn-moh -o {tmp_path}/out --emit-triton {tmp_path}/kernels -q"
    assert main(words.split()) == 0
    assert "kernels to" in capsys.readouterr().out
    assert (tmp_path / "kernels" / "attend_prefill.py").is_file()
