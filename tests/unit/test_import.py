"""Importing: light, lazy, owned by us, and laid out so that wheels hold what the tree holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsify
from sparsify import owner
from sparsify.errors import ForeignPackage

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "scipy", "sklearn", "transformers", "networkx", "rich", "typer")


def run(code: str, *, path: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path)))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )


# ---------------------------------------------------------------------------- light


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        ("sparsify", ()),
        ("sparsify.core, sparsify.regions, sparsify.text, sparsify.errors, sparsify.registry", ()),
        ("sparsify.runtime, sparsify.passes, sparsify.codegen", ()),
        ("sparsify.passes.ffn_moe, sparsify.passes.attn_moh", ()),
        ("sparsify.cli, sparsify.cli.build, sparsify.cli.use, sparsify.cli.about", ("typer",)),
    ],
)
def test_imports_stay_light(modules: str, allowed: tuple[str, ...]) -> None:
    code = f"import sys, json, {modules}; print(json.dumps(sorted(sys.modules)))"
    done = run(code)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout)) & set(HEAVY)
    assert loaded <= set(allowed)


def test_import_takes_little_time() -> None:
    """Processor time over a bare interpreter: wall time depends on what else runs."""
    code = "import time; t = time.process_time(); import sparsify; print(time.process_time() - t)"
    assert min(float(run(code).stdout) for _ in range(3)) < 0.1


# ---------------------------------------------------------------------------- lazy names


def test_every_name_loads() -> None:
    for name in sparsify.__all__:
        assert getattr(sparsify, name) is not None
    assert set(sparsify.__all__) <= set(dir(sparsify))
    assert sorted(sparsify.__all__) == sorted(set(sparsify.__all__))


def test_no_exported_name_is_a_module_of_ours() -> None:
    """``import sparsify.x`` would put the module where the exported ``x`` is."""
    inside = {p.stem for p in (ROOT / "sparsify").iterdir()}
    assert not inside & set(sparsify.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsify.nonsense
    assert not hasattr(sparsify, "_ipython_display_")


def test_type_checkers_see_the_same_names() -> None:
    text = (ROOT / "sparsify" / "__init__.py").read_text()
    static = text[text.index("if TYPE_CHECKING:") : text.index("__version__")]
    for name in sparsify.__all__:
        assert name in static


# ---------------------------------------------------------------------------- whose name it is


def distribution(folder: Path, name: str, files: str) -> Path:
    info = folder / f"{name}-1.7.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.7.0\n")
    (info / "RECORD").write_text(files)
    return folder


@pytest.mark.parametrize("name", ["sparsify", "eai_sparsify", "sparsify_nightly"])
def test_a_foreign_owner_is_named(tmp_path: Path, name: str) -> None:
    distribution(tmp_path, name, "sparsify/__init__.py,sha256=x,1\nsparsify/log.py,,\n")
    with pytest.raises(ForeignPackage) as caught:
        owner.check_owner([str(tmp_path)])
    shown = name.replace("_", "-")
    text = caught.value.render()
    assert f"the import name 'sparsify' belongs to another installed package, {shown}" in text
    assert f"pip uninstall -y {shown}" in text


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("sparsify_fx", "sparsify/__init__.py,,\n"),
        ("sparsify_plugins", "sparsify_plugins/__init__.py,,\n"),
        ("numpy", "sparsify/__init__.py,,\n"),  # its name says nothing: it is not even read
    ],
)
def test_others_are_left_alone(tmp_path: Path, name: str, files: str) -> None:
    owner.check_owner([str(distribution(tmp_path, name, files)), str(tmp_path / "not-there")])


def test_import_beside_a_foreign_owner_fails_in_a_process(tmp_path: Path) -> None:
    distribution(tmp_path, "eai_sparsify", "sparsify/__init__.py,,\n")
    done = run("import sparsify", path=str(tmp_path))
    assert done.returncode == 1
    assert "ForeignPackage: the import name 'sparsify' belongs to" in done.stderr
    done = run("import sys, sparsify_fx; sys.exit(sparsify_fx.main())", path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the import name 'sparsify' belongs to another")
    assert "Traceback" not in done.stderr


def test_the_scripts_say_so_where_the_foreign_files_win(tmp_path: Path) -> None:
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "sparsify_fx.py").write_text((ROOT / "sparsify_fx.py").read_text())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sparsify_fx as s; "
    code += "sys.exit(s.main())"
    done = run(code)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("error: the import name 'sparsify' belongs to another package (")
    assert second.startswith("  help: pip uninstall -y sparsify eai-sparsify")


def test_the_check_is_cheap() -> None:
    code = (
        "import sparsify.owner as o, time; t = time.process_time(); o.check_owner(); "
        "print(time.process_time() - t)"
    )
    assert min(float(run(code).stdout) for _ in range(3)) < 0.005


# ---------------------------------------------------------------------------- the house


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_wheels_hold_every_package_of_the_tree() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = {"sparsify": ROOT / "sparsify"}
    tops |= {f"sparsify.{n}": ROOT / n for n in ("passes", "codegen", "runtime")}
    found = set()
    for package, folder in tops.items():
        files = [f for f in folder.rglob("*.py") if "__pycache__" not in f.parts]
        found |= {
            ".".join((package, *f.parent.relative_to(folder).parts))
            for f in files
            if not (
                package == "sparsify"
                and f.relative_to(folder).parts[0] in ("passes", "codegen", "runtime")
            )
        }
    assert sorted(config["packages"]) == sorted(found)


@pytest.mark.parametrize("name", ["passes", "codegen", "runtime"])
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "sparsify" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


def test_version_is_the_distributions() -> None:
    assert f'version = "{sparsify.__version__}"' in (ROOT / "pyproject.toml").read_text()
