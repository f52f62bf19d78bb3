"""Why a capture failed, in the user's terms: what broke, on which line, and what to try."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from sparsify.errors import CaptureFailed

_LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "sparsify")
_MODEL_LIBRARIES = ("transformers", "diffusers")

# What the error says -> what to try, first hit wins.
_ADVICE = (
    (
        r"data.dependent|guard on|unbacked|\.item\(\)|Dynamic control flow|_local_scalar_dense",
        "the model decides in Python by a tensor's value: use torch.where (or torch.cond) there",
    ),
    (
        r"flash|flex_attention|FlexAttention",
        'load the model with attn_implementation="sdpa" (or "eager")',
    ),
    (
        r"vmap|functorch|_vmap",
        'load the model with attn_implementation="eager"',
    ),
    (
        r"were assigned during export|attributes? .* assigned",
        "the model stores tensors on itself in forward: register them as buffers, or return them",
    ),
    (
        r"Constraints violated|specializ|dynamic_shapes|dynamic dim|ConstraintViolation",
        "give a bigger example (no dimension of size 1), or capture with dynamic=False",
    ),
    (
        r"numpy|Tensor.numpy|__array__",
        "the model leaves torch (numpy) in forward: use torch operations only",
    ),
)


def failed(what: str, error: BaseException, *, help: str | None = None) -> CaptureFailed:  # noqa: A002
    """A CaptureFailed that carries the error's reason and the model's line."""
    reason = _reason(error)
    advice = help or _advice(f"{type(error).__name__}: {error}")
    return CaptureFailed(what, why=reason, where=user_line(error), help=advice)


def user_line(error: BaseException) -> str | None:
    """``file.py:123   source text`` of the deepest frame in the user's model."""
    mine: traceback.FrameSummary | None = None
    models: traceback.FrameSummary | None = None
    for frame in _frames(error):
        library = _library(frame.filename)
        if library is None and frame.filename.endswith(".py"):
            mine = frame
        elif library in _MODEL_LIBRARIES and "/models/" in frame.filename:
            models = frame
    found = mine or models
    if found is None:
        return None
    source = found.line or linecache.getline(found.filename, found.lineno or 0).strip()
    return f"--> {Path(found.filename).name}:{found.lineno}   {source}"


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    """Frames of the error and of what caused it, the root cause last."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        yield from traceback.extract_tb(link.__traceback__)


def _library(filename: str) -> str | None:
    """The library a file belongs to; 'python' for the standard library; None for user code."""
    path = filename.replace("\\", "/")
    if "/site-packages/" in path:
        return path.rpartition("/site-packages/")[2].split("/")[0].removesuffix(".py")
    if filename.startswith("<") or re.search(r"/lib/python3\.\d+/", path):
        return "python"
    home = str(Path(__file__).resolve().parents[2])
    inside = any(str(Path(filename)).startswith(f"{home}/{part}/") for part in _OWN_FOLDERS)
    return "sparsify" if inside else None


_OWN_FOLDERS = ("sparsify", "runtime", "passes", "codegen")


def _reason(error: BaseException) -> str:
    """The first telling lines of the error."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}"


def _advice(text: str) -> str:
    for pattern, advice in _ADVICE:
        if re.search(pattern, text, re.IGNORECASE):
            return advice
    return "pass example=... with inputs that the model runs on; see torch.export's limits"
