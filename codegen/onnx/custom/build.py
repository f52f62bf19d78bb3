"""A library of operators, compiled from :mod:`~sparsify.codegen.onnx.custom.source`.

On x86-64 it holds every kernel three times: for any processor, for AVX2, for AVX-512. Which of them
runs is asked of the processor when the library is registered, so it is no worse bound to the
machine that built it than another program is. Elsewhere there is one, in the vectors that GCC
makes for any processor of that kind (NEON on AArch64).
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparsify.codegen.cpu.build import (
    FAST,
    SHARED,
    BuildFailed,
    Compiler,
    NoCompiler,
    compiler,
    run,
)
from sparsify.codegen.onnx.custom.source import WIDTHS, Kind, source
from sparsify.codegen.store import store

HIDDEN = "-fvisibility=hidden"
VECTORS = {  # LANES -> flags; operator.c asks the processor for the same
    4: (),
    8: ("-mavx2", "-mfma"),
    16: ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
}
X86 = ("x86_64", "AMD64")


def check() -> None:
    """NoCompiler where none is there."""
    _compiler()


def library(kinds: Sequence[Kind]) -> tuple[str, bytes]:
    """Source and library; kept, as kernels are, for the next export.

    Raises:
        NoCompiler, BuildFailed.
    """
    made_by, text = _compiler(), text_of(kinds)
    parts = (text, made_by.version, *made_by.command, *FAST, platform.machine())
    entry = f"onnx-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.bin"
    kept = store()
    found = kept.get(entry)
    if found is None:
        found = _built(text, len(kinds), made_by)
        kept.put(entry, found)
    return text, found


def _compiler() -> Compiler:
    try:
        return compiler()
    except NoCompiler as missing:
        raise NoCompiler(
            "there is no C compiler, so operators for ONNX Runtime cannot be built",
            why=missing.why,
            help="apt-get install gcc, set CC to a C compiler, or export for target 'ort'",
        ) from missing


def text_of(kinds: Sequence[Kind]) -> str:
    """The source, with the commands that compile it at its head."""
    lines = [
        "Operators of a model that sparsify exported, for ONNX Runtime 1.17 and later. To build",
        "them for another system, with the names of your files:",
        "",
        *("  " + " ".join(command) for command in commands(["cc"], "model.onnx.c", len(kinds))),
    ]
    comment = "\n".join(f" * {line}".rstrip() for line in lines)
    return f"/*{comment[2:]}\n */\n{source(kinds)}"


def commands(
    compile_with: Sequence[str], text: str, kinds: int, out: str = "model.onnx.so"
) -> list[list[str]]:
    """Compile every part of ``text``, then link."""
    plain = [*compile_with, *SHARED[1:], HIDDEN, *FAST]
    widths = WIDTHS if platform.machine() in X86 else WIDTHS[:1]
    made, objects = [[*plain, "-c", text, "-o", "main.o"]], ["main.o"]
    for kind in range(kinds):
        for lanes in widths:
            part = f"kernel-{kind}-{lanes}.o"
            wide = [*VECTORS[lanes], f"-DLANES={lanes}", f"-DKIND={kind}"]
            made.append([*plain, *wide, "-c", text, "-o", part])
            objects.append(part)
    return [*made, [*compile_with, SHARED[0], "-o", out, *objects, "-lm"]]


def _built(text: str, kinds: int, made_by: Compiler) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        code, out = Path(folder) / "operators.c", Path(folder) / "operators.so"
        code.write_text(text, encoding="utf-8")
        for command in commands(made_by.command, str(code), kinds, str(out)):
            here = [str(Path(folder) / a) if a.endswith(".o") else a for a in command]
            said = run(here)
            if said.returncode:
                raise BuildFailed(
                    "operators for ONNX Runtime do not compile",
                    why=f"{' '.join(here)}: {said.stderr.strip()[:2000]}",
                    help="set CC to another C compiler (gcc and clang are known to work)",
                )
        return out.read_bytes()
