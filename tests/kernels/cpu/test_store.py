"""The cache of kernels: eight processes at once, damage, folders that cannot be written."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparsify.codegen import machine as machines
from sparsify.codegen import store as stores
from sparsify.codegen.cpu import build
from sparsify.codegen.machine import isa_of, machine
from sparsify.codegen.store import Store

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(stores.VARIABLE, str(folder))
    return folder


@pytest.fixture
def compiler() -> build.Compiler:
    try:
        return build.compiler()
    except build.NoCompiler as missing:
        pytest.skip(missing.what)


def entries(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


# ---------------------------------------------------------------------------- entries


def test_entries_come_back_and_replace_each_other(fresh: Path) -> None:
    kept = Store(fresh)
    assert kept.get("a") is None and kept.get_json("k") is None
    for content in (b"", b"one", os.urandom(3000)):
        kept.put("a", content)
        assert Store(fresh).get("a") == content
    kept.put_json("ffn 8x64 float32", {"variant": 3})
    assert Store(fresh).get_json("ffn 8x64 float32") == {"variant": 3}
    assert kept.get_json("ffn 8x65 float32") is None
    assert not [p for p in fresh.iterdir() if p.name.endswith(".partial")]
    assert not kept.remarks


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_damaged_entries_are_made_again(fresh: Path, damage: str) -> None:
    kept = Store(fresh)
    path = kept.put("a", bytes(range(200)))
    whole = path.read_bytes()
    broken = {
        "cut": whole[:100],
        "flip": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:],
        "empty": b"",
        "other": b"not ours",
    }[damage]
    path.write_bytes(broken)
    assert kept.get("a") is None
    assert kept.build("a", lambda: b"new") == path
    assert kept.get("a") == b"new"
    assert len(kept.remarks) == 1 and "damaged" in kept.remarks[0]


def test_a_failed_write_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Store(fresh)
    kept.put("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):  # the temporary folder is full too
            kept.put("a", b"new")
    assert [p.name for p in fresh.iterdir()] == ["a"]
    assert Store(fresh).get("a") == b"old"


def test_an_entry_that_appears_while_it_is_looked_for_stays(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Store(fresh)
    read = Path.read_bytes

    def late(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read)
        Store(fresh).put("a", b"theirs")
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", late)
    assert kept.find("a") is None
    assert kept.build("a", lambda: b"mine").read_bytes().startswith(b"theirs")
    assert not kept.remarks


def test_threads_build_an_entry_once(fresh: Path) -> None:
    kept, made = Store(fresh), []
    start = threading.Barrier(6)

    def make() -> bytes:
        made.append(1)
        return b"x"

    def work() -> None:
        start.wait()
        kept.build("a", make)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(made) == 1


# ---------------------------------------------------------------------------- no folder to write


@pytest.mark.parametrize("why", ["file", "erofs"])
def test_a_folder_that_cannot_be_written(
    fresh: Path, why: str, monkeypatch: pytest.MonkeyPatch, compiler: build.Compiler
) -> None:
    if why == "file":  # permissions do not bind root, a file in the way does
        fresh.write_text("in the way")
    else:
        before = Store(fresh).put("old", b"kept")
        real = stores.tempfile.mkstemp

        def read_only(*args: object, **kwargs: object) -> tuple[int, str]:
            if kwargs.get("dir") == fresh:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(stores.tempfile, "mkstemp", read_only)
    kept = stores.store()
    assert build.load(SOURCE, "answer").answer() == 42
    assert len(kept.remarks) == 1
    assert str(fresh) in kept.remarks[0] and stores.VARIABLE in kept.remarks[0]
    assert ("Read-only" in kept.remarks[0]) == (why == "erofs")
    kept.put_json("tuned", 7)
    assert kept.get_json("tuned") == 7  # within this process
    assert Store(fresh).get_json("tuned") is None
    if why == "erofs":
        assert kept.get("old") == b"kept"
        assert entries(fresh) == [before]
    assert len(kept.remarks) == 1


def test_the_temporary_folder_goes_with_the_process(fresh: Path) -> None:
    fresh.write_text("in the way")
    code = (
        "from sparsify.codegen.store import store\n"
        "store().put('a', b'x'); print(store().private('').resolve())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(said.stdout.strip()).exists()


def test_a_folder_without_leave_to_execute(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: build.Compiler
) -> None:
    real = ctypes.CDLL

    def picky(path: str) -> ctypes.CDLL:
        if path.startswith(str(fresh)):
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(build.ctypes, "CDLL", picky)
    assert build.load(SOURCE, "answer").answer() == 42
    assert "failed to map" in stores.store().remarks[0]


# ---------------------------------------------------------------------------- compiling

# Forked before anything is loaded, and let go together: an import of torch each would take seconds.
MANY = """
import os, sys
from sparsify.codegen.cpu import build
from sparsify.codegen.store import store
made = []
real = build.compiled
build.compiled = lambda *a: (made.append(1), real(*a))[1]
wait, go = os.pipe()
for child in range(8):
    if not os.fork():
        os.close(go)
        os.read(wait, 1)
        said = build.load(sys.argv[1], "answer").answer(), len(made), store().remarks
        os.write(1, (" ".join(map(str, said)) + "\\n").encode())
        os._exit(0)
os.close(go)
for child in range(8):
    assert os.wait()[1] == 0
"""


def test_eight_processes_build_one_good_entry(fresh: Path, compiler: build.Compiler) -> None:
    args = [sys.executable, "-c", MANY, SOURCE]
    said = subprocess.run(args, capture_output=True, text=True, check=True, timeout=100).stdout
    lines = [line.split() for line in said.splitlines()]
    assert [(answer, remarks) for answer, _, remarks in lines] == [("42", "[]")] * 8
    assert sum(int(made) for _, made, _ in lines) == 1
    (entry,) = entries(fresh)
    assert Store(fresh).find(entry.name) == entry
    assert not [p for p in fresh.iterdir() if p.name.endswith(".partial")]


def test_a_damaged_kernel_is_compiled_again(fresh: Path, compiler: build.Compiler) -> None:
    build.load(SOURCE, "answer")
    (entry,) = entries(fresh)
    whole = entry.read_bytes()
    entry.unlink()  # the one that is mapped here stays whole
    entry.write_bytes(whole[: len(whole) // 2])
    code = "import sys; from sparsify.codegen.cpu import build as b; from sparsify.codegen "
    code += "import store as s; print(b.load(sys.argv[1], 'answer').answer(), s.store().remarks)"
    args = [sys.executable, "-c", code, SOURCE]
    said = subprocess.run(args, capture_output=True, text=True, check=True).stdout
    assert said.startswith("42 ") and "damaged" in said
    assert Store(fresh).find(entry.name) == entry


def test_loaded_once_per_process(fresh: Path, compiler: build.Compiler) -> None:
    first = build.load(SOURCE, "answer")
    assert build.load(SOURCE, "answer") is first
    assert build.load(SOURCE.replace("42", "43"), "answer").answer() == 43
    assert len(entries(fresh)) == 2


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NoCompiler, match="run eagerly") as caught:
        build.load(SOURCE, "answer")
    assert "apt-get install gcc" in (caught.value.help or "")
    monkeypatch.setenv("CC", "no-such-cc -O1")
    with pytest.raises(build.NoCompiler, match="CC=no-such-cc"):
        build.load(SOURCE, "answer")


def test_source_that_does_not_compile(compiler: build.Compiler, fresh: Path) -> None:
    with pytest.raises(build.BuildFailed, match="nonsense"):
        build.load("nonsense nonsense;", "answer")
    assert not entries(fresh)


def test_compilers_without_openmp_are_remarked(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: build.Compiler
) -> None:
    simple = tmp_path / "simple-cc"
    command = " ".join(compiler.command)
    simple.write_text(f'#!/bin/sh\ncase "$*" in *openmp*) exit 1;; esac\nexec {command} "$@"\n')
    simple.chmod(0o755)
    monkeypatch.setenv("CC", str(simple))
    source = "#ifdef _OPENMP\nint has(void){return 1;}\n#else\nint has(void){return 0;}\n#endif\n"
    assert build.load(source, "has").has() == 0
    assert "-fopenmp" in stores.store().remarks[0]


def test_one_openmp_runtime_and_torchs_threads(compiler: build.Compiler) -> None:
    code = """
import torch, ctypes
from sparsify.codegen.cpu import build
kernel = build.load('''
#include <omp.h>
int team(int n) { int k = 0;
#pragma omp parallel num_threads(n)
{
#pragma omp atomic
k++;
}
return k; }
''', "team")
torch.set_num_threads(2)
torch.ones(1 << 20).add(1)
maps = [line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line]
print(kernel.team(build.threads()), len(set(maps)))
torch.set_num_threads(1)
print(kernel.team(build.threads()), len(set(maps)))
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["2", "1", "1", "1"]


# ---------------------------------------------------------------------------- machine


def test_isa() -> None:
    assert isa_of(("avx2", "avx512f", "fma"), "x86_64") == "avx512"
    assert isa_of(("avx2", "fma"), "x86_64") == "avx2"
    assert isa_of(("avx2",), "x86_64") == "generic"
    assert isa_of(("asimd", "fp"), "aarch64") == "neon"
    assert isa_of((), "arm64") == "neon"
    assert isa_of((), "riscv64") == "generic"


def test_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = machine()
    assert here.cores >= 1 and here.lanes in (4, 8, 16)
    assert here.key.startswith(f"{here.isa}-{here.cores}c-")
    for change in ({"cores": here.cores + 1}, {"l2": 7}, {"flags": ("x",)}, {"model": "other"}):
        assert dataclasses.replace(here, **change).key != here.key  # type: ignore[arg-type]
    monkeypatch.setattr(machines, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(machines, "CACHES", tmp_path / "none")
    bare = machine.__wrapped__()
    assert bare.flags == () and bare.l1 == bare.l2 == bare.l3 == 0 and bare.cores == here.cores
    index = tmp_path / "none" / "index0"
    index.mkdir(parents=True)
    for name, value in {"level": "2", "type": "Unified", "size": "512K"}.items():
        (index / name).write_text(value + "\n")
    assert machine.__wrapped__().l2 == 512 << 10
