"""The built wheel, unpacked elsewhere: the mapped folders are subpackages, the scripts run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files, built from the sdist's file list as pip would."""
    source = tmp_path_factory.mktemp("source") / "tree"
    wanted = ("sparsify", "passes", "codegen", "runtime", "sparsify_fx.py", "pyproject.toml")
    source.mkdir()
    for name in (*wanted, "LICENSE", "README.md"):
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, symlinks=True, ignore=ignored)
        elif path.exists():
            shutil.copy(path, source / name)
        else:  # the README comes last
            (source / name).write_text("not written yet\n")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # an sdist, and a wheel from it
    (wheel,) = out.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(site: Path, code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=site, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_source_file_is_in_the_wheel(site: Path) -> None:
    for top in ("sparsify", "passes", "codegen", "runtime"):
        package = top if top == "sparsify" else f"sparsify/{top}"
        for file in (ROOT / top).rglob("*"):
            if file.suffix in (".py", ".json", ".typed", ".c") and "__pycache__" not in file.parts:
                assert (site / package / file.relative_to(ROOT / top)).is_file(), file
    assert not (site / "passes").exists()
    assert not (site / "tests").exists()


def test_the_wheel_imports_and_lists_its_passes(site: Path) -> None:
    code = "from sparsify.passes import ffn_moe; print(ffn_moe.__file__)"
    assert python(site, code) == str(site / "sparsify" / "passes" / "ffn_moe.py")
    listed = python(site, "import sparsify_fx, sys; sys.argv[1:] = ['passes']; sparsify_fx.main()")
    assert "ffn-moe" in listed


def test_the_metadata_names_scripts_and_licence(site: Path) -> None:
    (info,) = site.glob("sparsify_fx-*.dist-info")
    points = (info / "entry_points.txt").read_text()
    assert "sparsify = sparsify_fx:main" in points
    assert "sparsify-fx = sparsify_fx:main" in points
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert (info / "licenses" / "LICENSE").is_file()
