"""What the kernels of routed modules share: their C source, pointers, and when they decline.

A kernel is called for every token that is decoded, so its Python work is a few microseconds: what
changes with every call goes to C as arguments, what belongs to the module in one struct that is
built anew only when one of the module's tensors has moved.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.codegen.cpu import build
from sparsify.codegen.machine import machine
from sparsify.core import Refused

FEW = 8  # tokens; MOST in rows.c
DTYPES = {torch.float32: "VALUE_FLOAT32", torch.bfloat16: "VALUE_BFLOAT16"}
_KINDS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "i": ctypes.c_int,
}
_HERE = Path(__file__).parent
Made = tuple[tuple[int, ...], int, Any]  # what it was made of, its address, what it keeps alive
UNMADE: Made = ((), 0, None)
# Ways of a projection (sparsify.codegen.cpu.choice measures them): the C kernel; dead inputs
# multiplied as zeros, or dead outputs dropped; the plain product where all is live.
Way = Literal["few", "dense", "whole"]
Cuts = tuple[float, ...]  # of 0 to FEW tokens: the live share from which dense is faster
NEVER: Cuts = (math.inf,) * (FEW + 1)


class Lowered:
    """Base of kernels: copies of a module share its kernel's code, files do not hold it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = copy.copy(self)
        twin.forget()
        return twin

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> Any:
        return type(None), ()  # a module that was pickled runs eagerly until it is lowered again

    def forget(self) -> None:
        """Drop what was made for one module's tensors."""


@functools.lru_cache(maxsize=16)
def part(file: str) -> str:
    """The text of one of our C files."""
    return (_HERE / file).read_text(encoding="utf-8")


def source(name: str, dtype: torch.dtype, int8: bool = False) -> str:
    """The C source of ``<name>.c``, and ``<name>_threads.c`` where there is one, for values of
    ``dtype`` on this machine."""
    lines = [f"#define LANES {machine().lanes}", f"#define {DTYPES[dtype]}"]
    if int8:
        lines.append("#define WEIGHT_INT8")
    rest = [part(f"{name}_threads.c")] if (_HERE / f"{name}_threads.c").exists() else []
    return "\n".join([*lines, part("vectors.h"), part(f"{name}.c"), *rest])


def function(
    name: str, entry: str, dtype: torch.dtype, arguments: str, *, int8: bool = False
) -> Any:
    """C function ``entry`` of ``<name>.c``; NoCompiler, BuildFailed.

    Args:
        arguments: one letter each: p pointer, l int64, f float, i int.
    """
    title = f"{name}-int8" if int8 else f"{name}-{str(dtype).removeprefix('torch.')}"
    made = build.load(source(name, dtype, int8), title)[entry]
    made.argtypes = [_KINDS[letter] for letter in arguments]
    made.restype = ctypes.c_int64
    return made


def dtype_of(weight: Tensor) -> torch.dtype:
    """The dtype that the kernel is made for; Refused where there is none."""
    if weight.dtype not in DTYPES:
        raise Refused(f"CPU kernels are for float32 and bfloat16, not {weight.dtype}")
    if weight.device.type != "cpu":
        raise Refused(f"the weights are on {weight.device}")
    return weight.dtype


def usable(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether C may read these as dense arrays of these dtypes."""
    return all(
        t is None or (t.dtype == dtype and t.is_contiguous() and t.device.type == "cpu")
        for t, dtype in zip(tensors, dtypes, strict=True)
    )


def plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``x`` is real data on the CPU: no fake, traced, or wrapped tensor."""
    return type(x) is Tensor and x.dtype is dtype and x.is_cpu and not torch.compiler.is_compiling()


def checked(result: int) -> int:
    """What a kernel returns, unless it found no memory."""
    if result < 0:
        raise MemoryError("a CPU kernel could not allocate its few kilobytes")
    return result


def version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def address(tensor: Tensor | None) -> int:
    """Of its first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
