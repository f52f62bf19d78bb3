"""Compiles C kernels at first use with the system's compiler, and loads them.

Flags: ``-O3 -march=native`` (vectors of this processor), ``-ffp-contract=fast`` (fused
multiply-add), ``-fno-math-errno`` and ``-fno-trapping-math`` (nobody reads errno or the exception
flags, and both keep loops from being vectorised). None of ``-ffast-math``: routed models meet NaN
and infinity (masked scores are -inf, dead units may hold anything), and sums keep the order that
the source gives them. ``-fopenmp``: torch's wheel brings a libgomp of the same name (SONAME), so an
object that is loaded after torch shares torch's OpenMP runtime and threads.

Why C and the system's compiler, not numba: speed is no reason. On the sum over the 288 live rows of
a 576 x 576 float32 projection (one thread, weights out of cache, a shared machine on 2026-11-25)
numba 0.68.1 took 71 to 91 us a call, C 67 to 76 us. But numba adds 208 MB to an installation
(numba 35, llvmlite 173) and 0.4 s or more to every process that imports it, and compiles for 0.5 to
0.9 s per kernel and process unless its own cache is used (C: 1 to 2 s per kernel once per machine,
then 3 ms); it brings a thread pool of its own beside torch's, and has neither bfloat16 nor vector
types. C needs a compiler where the model runs: without one routed modules run eagerly, with a
remark.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch  # before any kernel, whose libgomp is then torch's

from sparsify.codegen.machine import machine
from sparsify.codegen.store import Store, store
from sparsify.errors import MissingDependency, SparsifyBug

COMPILERS = ("cc", "gcc", "clang")
SHARED = ("-shared", "-fPIC", "-std=gnu11", "-Wno-psabi")
FAST = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# From best to what any compiler can do: the first that compiles is taken.
VARIANTS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
TIMEOUT = 300  # seconds for one kernel; they take less than one


class NoCompiler(MissingDependency):
    """There is no C compiler: routed modules run eagerly."""


class BuildFailed(SparsifyBug):
    """The compiler is there, but refused a kernel of ours."""


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C compiler: the command (with arguments, from ``$CC``) and what ``--version`` says."""

    command: tuple[str, ...]
    version: str


def compiler() -> Compiler:
    """``$CC``, else the first of cc, gcc and clang; NoCompiler where none runs."""
    return _compiler(os.environ.get("CC"), os.environ.get("PATH"))


@functools.lru_cache(maxsize=8)
def _compiler(chosen: str | None, path: str | None) -> Compiler:
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0], path=path):
            said = run([*command, "--version"])
            if not said.returncode:
                return Compiler(tuple(command), said.stdout.strip())
    tried = f"CC={chosen}" if chosen else ", ".join(COMPILERS)
    raise NoCompiler(
        "there is no C compiler, so CPU kernels cannot be built and routed modules run eagerly",
        why=f"tried {tried}",
        help="apt-get install gcc   (or set CC to a C compiler)",
    )


_LOADED: dict[tuple[str, str], ctypes.CDLL] = {}
_LOCK = threading.Lock()


def load(source: str, name: str) -> ctypes.CDLL:
    """C ``source``, compiled (or found in the cache) and loaded; NoCompiler, BuildFailed.

    Args:
        name: of the kernel, in file names: letters, digits and dashes.
    """
    made_by = compiler()
    parts = (source, made_by.version, *made_by.command, *SHARED, *FAST, *map(" ".join, VARIANTS))
    digest = hashlib.sha256("\0".join((*parts, machine().key)).encode()).hexdigest()
    entry, kept = f"{name}-{digest[:24]}.so", store()
    with _LOCK:
        found = _LOADED.get((entry, str(kept.folder)))
        if found is None:
            found = _open(entry, source, made_by, kept)
            _LOADED[entry, str(kept.folder)] = found
    return found


def _open(entry: str, source: str, made_by: Compiler, kept: Store) -> ctypes.CDLL:
    path = kept.build(entry, lambda: compiled(source, made_by, kept))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # e.g. the folder is mounted without leave to execute
        spare = Store(kept.private(error))
        return ctypes.CDLL(str(spare.build(entry, lambda: compiled(source, made_by, kept))))


def compiled(source: str, made_by: Compiler, kept: Store) -> bytes:
    """The shared object; BuildFailed with what the compiler said.

    Where it does not know all flags, those that it knows are used, and ``kept`` remarks it.
    """
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        code, out = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
        code.write_text(source, encoding="utf-8")
        first = ""
        for variant in VARIANTS:
            flags = (*SHARED, *FAST, *variant)
            said = run([*made_by.command, *flags, "-o", str(out), str(code), "-lm"])
            if not said.returncode:
                if variant != VARIANTS[0]:
                    lost = " ".join(f for f in VARIANTS[0] if f not in variant)
                    kept.remark(
                        f"{made_by.command[0]} does not compile with {lost}: kernels are slower"
                    )
                return out.read_bytes()
            first = first or said.stderr.strip()
    raise BuildFailed(
        "a CPU kernel does not compile",
        why=f"{' '.join(made_by.command)}: {first[:2000]}",
        help="set CC to another C compiler (gcc and clang are known to work)",
    )


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command and what it said; exit code 1 where it cannot be run, or takes too long."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def threads() -> int:
    """How many threads a kernel may use: what torch was told."""
    return torch.get_num_threads()
