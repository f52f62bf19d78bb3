"""Activation programs as Triton functions that kernels take as constants."""

from __future__ import annotations

import functools
import hashlib
import json
import linecache
from typing import Any

import triton
import triton.language as tl

from sparsify.codegen.elementwise import canonical, triton_source
from sparsify.codegen.triton import math
from sparsify.runtime.program import Program


def key_of(program: Program) -> str:
    """``program`` as text, an argument of an operator; the same whatever its steps are called."""
    return json.dumps(canonical(program).to_json(), separators=(",", ":"))


@functools.lru_cache(maxsize=256)
def functions(key: str) -> tuple[Any, Any]:
    """(value, value and gradients) of the program with that key; CannotLower if not known.

    The first takes (up,) or (up, gate), the second ``grad`` as well; all float32 blocks.
    """
    program = Program.from_json(json.loads(key))
    text = source(program)
    name = f"<sparsify activation {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    # Triton reads a function's source by its file; linecache is where inspect finds one that has
    # no file.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    space |= {n: getattr(math, n) for n in ("tanh", "expm1", "log1p")}
    exec(compile(text, name, "exec"), space)
    return space["act"], space["act_grad"]


def source(program: Program) -> str:
    """The text of both functions."""
    return triton_source(program) + "\n\n" + triton_source(program, "act_grad", gradient=True)
