"""What the export needs beside torch, imported late: ``pip install 'sparsify-fx[onnx]'``."""

from __future__ import annotations

import importlib
from typing import Any

from sparsify.errors import MissingDependency

EXTRA = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")


def need(*names: str) -> tuple[Any, ...]:
    """These modules; MissingDependency with the line that installs them."""
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.split(".")[0] != name.split(".")[0]:
                raise
            raise MissingDependency(
                f"ONNX export needs {name}, which is not installed",
                help="pip install 'sparsify-fx[onnx]'",
            ) from None
    return tuple(found)
