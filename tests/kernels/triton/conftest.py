"""Kernels run in Triton's interpreter, on CPU tensors: the variable is read when triton loads."""

from __future__ import annotations

import importlib.util
import os

os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
