"""The library beside a file: ``NAME.onnx.so``, and ``NAME.onnx.c``, which it was built from.

Nothing here needs torch until there is something to build.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.codegen.onnx.custom import DOMAIN

if TYPE_CHECKING:
    from sparsify.codegen.onnx.custom.source import Kind

_KNOWN: dict[str, Kind] = {}  # by the operator's name: what a graph asks for


def known(kind: Kind) -> str:
    """The operator's name; :func:`put` finds what it stands for."""
    _KNOWN[kind.name] = kind
    return kind.name


def beside(path: Path) -> tuple[Path, Path]:
    """Library and source of a file."""
    return path.with_name(f"{path.name}.so"), path.with_name(f"{path.name}.c")


def put(model: Any, path: Path) -> None:
    """Write what an ``onnx_ir.Model``, written to ``path``, needs: nothing, or both files.

    Raises:
        NoCompiler, BuildFailed: the library cannot be built.
    """
    names = sorted({n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN})
    if not names:
        return
    from sparsify.codegen.onnx.custom.build import library

    text, made = library([_KNOWN[name] for name in names])
    binary, code = beside(path)
    binary.write_bytes(made)
    code.write_text(text, encoding="utf-8")
