"""Routed rows and columns on CPU, for one to eight tokens: projections of live heads, in C.

``dots.c`` computes the output rows of live units only, ``rows.c`` adds up the input columns of live
units only (each times its weight), as :mod:`sparsify.runtime.heads` does. Beyond eight tokens eager
runs, which groups tokens by unit into matrix products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.cpu import build
from sparsify.codegen.cpu.call import (
    FEW,
    UNMADE,
    Lowered,
    Made,
    address,
    checked,
    dtype_of,
    function,
    plain,
    usable,
)
from sparsify.codegen.cpu.linear import Routed
from sparsify.runtime.heads import RoutedColumns, RoutedRows


class RoutedDots(ctypes.Structure):
    """``routed`` of dots.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "blocks bias others other_bias places".split()),
        *((name, ctypes.c_int64) for name in "units size n_others inputs".split()),
    ]


class _HeadsKernel(Lowered):
    """What rows and columns share: a selection from outside, one C call.

    Attributes:
        inputs, outputs: features; units: of the selection.
        run: the C function.
    """

    dtype: torch.dtype
    units: int
    inputs: int
    outputs: int
    run: Callable[..., int]

    def __init__(self) -> None:
        self._made: Made = UNMADE

    def __call__(self, module: Any, x: Tensor, select: Tensor) -> Tensor | None:
        found = _inputs(x, select, self.dtype, self.inputs, self.units)
        made = self._struct(module)
        if found is None or not made:
            return None
        x, select, tokens = found
        y = x.new_empty((*x.shape[:-1], self.outputs))
        pairs = self.run(
            made, x.data_ptr(), select.data_ptr(), y.data_ptr(), tokens, build.threads()
        )
        counter = module.counter
        counter.seen(tokens, self.units, checked(pairs))
        counter.rows += pairs
        return y

    def forget(self) -> None:
        self._made = UNMADE

    def _struct(self, module: Any) -> int:
        """The address of the module's struct; 0 where C cannot read its tensors."""
        raise NotImplementedError


class RowsKernel(_HeadsKernel):
    """The kernel of one :class:`RoutedRows`; Refused for dtypes that it does not know."""

    def __init__(self, module: RoutedRows) -> None:
        super().__init__()
        self.dtype = dtype_of(module.blocks)
        self.units, self.size, self.inputs = module.blocks.shape
        self.others = 0 if module.others is None else len(module.others)
        self.outputs = self.units * self.size + self.others
        self.run = function("dots", "routed_rows", self.dtype, "ppppli")

    def _struct(self, module: RoutedRows) -> int:
        have = module._parameters  # not through __getattr__
        tensors = (
            have["blocks"], have.get("bias"), have.get("others"), have.get("other_bias"),
            module._buffers["places"],
        )  # fmt: skip
        now = tuple(map(address, tensors))
        if self._made[0] != now:
            self._made = (now, 0, None)
            if usable(tensors, (*[self.dtype] * 4, torch.int64)):
                struct = RoutedDots(*now, self.units, self.size, self.others, self.inputs)
                self._made = (now, ctypes.addressof(struct), struct)
        return self._made[1]


class ColumnsKernel(_HeadsKernel):
    """The kernel of one :class:`RoutedColumns`; Refused for dtypes that it does not know."""

    def __init__(self, module: RoutedColumns) -> None:
        super().__init__()
        self.dtype = dtype_of(module.blocks)
        self.units, size, self.outputs = module.blocks.shape
        self.inputs = self.units * size
        self.run = function("rows", "routed_columns", self.dtype, "ppppli")

    def _struct(self, module: RoutedColumns) -> int:
        have = module._parameters
        tensors = (
            have["blocks"], have.get("bias"), have.get("dropped"), module._buffers["places"],
        )  # fmt: skip
        now = tuple(map(address, tensors))
        if self._made[0] != now:
            self._made = (now, 0, None)
            if usable(tensors, (*[self.dtype] * 3, torch.int64)):
                struct = Routed(
                    matrix=now[0], bias=now[1], dropped=now[2], places=now[3],
                    rows=self.inputs, out=self.outputs, units=self.units,
                )  # fmt: skip
                self._made = (now, ctypes.addressof(struct), struct)
        return self._made[1]


def _inputs(
    x: Tensor, select: Tensor, dtype: torch.dtype, width: int, units: int
) -> tuple[Tensor, Tensor, int] | None:
    """x (..., width) and select (..., units) as C reads them, and their tokens; None to decline."""
    if not plain(x, dtype) or not plain(select, dtype) or not x.dim():
        return None
    if x.size(-1) != width:
        return None
    tokens = x.numel() // width
    if not 0 < tokens <= FEW or select.numel() != tokens * units:
        return None
    x = x if x.is_contiguous() else x.contiguous()
    return x, select if select.is_contiguous() else select.contiguous(), tokens
