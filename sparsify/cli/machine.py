"""What this machine is and which versions are installed, without importing any of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import sparsify

_PACKAGES = (
    "torch", "transformers", "diffusers", "safetensors", "numpy", "gguf",
    "triton", "onnx", "onnxscript", "onnxruntime", "typer", "rich",
)  # fmt: skip


def facts() -> dict[str, object]:
    """Versions and hardware as plain values."""
    return {
        "sparsify": sparsify.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    """NVIDIA devices by their driver's files: no library is loaded, no process started."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    found = []
    for file in files:
        lines = dict(line.partition(":")[::2] for line in file.read_text().splitlines())
        found.append(lines.get("Model", "").strip())
    return found
