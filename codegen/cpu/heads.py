"""Routed rows and columns on CPU, for one to eight tokens: projections of live heads, in C.

``dots.c`` computes the output rows of live units only, ``rows.c`` adds up the input columns of live
units only (each times its weight), as :mod:`sparsify.runtime.heads` does. Beyond eight tokens eager
runs, which groups tokens by unit into matrix products.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsify.codegen.cpu import build
from sparsify.codegen.cpu.call import (
    FEW,
    Pointers,
    checked,
    dtype_of,
    function,
    parameter,
    plain,
    pointers,
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


class RowsKernel:
    """The kernel of one :class:`RoutedRows`; Refused for dtypes that it does not know."""

    def __init__(self, module: RoutedRows) -> None:
        self.dtype = dtype_of(module.blocks)
        self.units, self.size, self.inputs = module.blocks.shape
        self.others = 0 if module.others is None else len(module.others)
        self.run = function("dots", "routed_rows", self.dtype, "ppppli")
        self._made: tuple[Pointers, RoutedDots | None] = ((), None)

    def __call__(self, module: RoutedRows, x: Tensor, select: Tensor) -> Tensor | None:
        found = _inputs(x, select, self.dtype, self.inputs, self.units)
        made = self._struct(module)
        if found is None or made is None:
            return None
        x, select, tokens = found
        out = self.units * self.size + self.others
        y = torch.empty((*x.shape[:-1], out), dtype=self.dtype)
        pairs = checked(
            self.run(
                ctypes.byref(made), x.data_ptr(), select.data_ptr(), y.data_ptr(), tokens,
                build.threads(),
            )
        )  # fmt: skip
        module.counter.seen(tokens, self.units, pairs)
        module.counter.rows += pairs
        return y

    def _struct(self, module: RoutedRows) -> RoutedDots | None:
        names = ("blocks", "bias", "others", "other_bias")
        tensors = (*(parameter(module, n) for n in names), module._buffers["places"])
        now = pointers(tensors)
        have, struct = self._made
        if have == now:
            return struct
        struct = None
        if usable(tensors, (*[self.dtype] * 4, torch.int64)):
            sizes = (self.units, self.size, self.others, self.inputs)
            struct = RoutedDots(*now, *sizes)
        self._made = (now, struct)
        return struct


class ColumnsKernel:
    """The kernel of one :class:`RoutedColumns`; Refused for dtypes that it does not know."""

    def __init__(self, module: RoutedColumns) -> None:
        self.dtype = dtype_of(module.blocks)
        self.units, self.size, self.outputs = module.blocks.shape
        self.run = function("rows", "routed_columns", self.dtype, "ppppli")
        self._made: tuple[Pointers, Routed | None] = ((), None)

    def __call__(self, module: RoutedColumns, z: Tensor, select: Tensor) -> Tensor | None:
        found = _inputs(z, select, self.dtype, self.units * self.size, self.units)
        made = self._struct(module)
        if found is None or made is None:
            return None
        z, select, tokens = found
        y = torch.empty((*z.shape[:-1], self.outputs), dtype=self.dtype)
        pairs = checked(
            self.run(
                ctypes.byref(made), z.data_ptr(), select.data_ptr(), y.data_ptr(), tokens,
                build.threads(),
            )
        )  # fmt: skip
        module.counter.seen(tokens, self.units, pairs)
        module.counter.rows += pairs
        return y

    def _struct(self, module: RoutedColumns) -> Routed | None:
        names = ("blocks", "bias", "dropped")
        tensors = (*(parameter(module, n) for n in names), module._buffers["places"])
        now = pointers(tensors)
        have, struct = self._made
        if have == now:
            return struct
        struct = None
        if usable(tensors, (*[self.dtype] * 3, torch.int64)):
            struct = Routed(
                matrix=now[0], bias=now[1], dropped=now[2], places=now[3],
                rows=self.units * self.size, out=self.outputs, units=self.units,
            )  # fmt: skip
        self._made = (now, struct)
        return struct


def _inputs(
    x: Tensor, select: Tensor, dtype: torch.dtype, width: int, units: int
) -> tuple[Tensor, Tensor, int] | None:
    """x (..., width) and select (..., units) as C reads them, and their tokens; None to decline."""
    if not plain(x, dtype) or not plain(select, dtype) or x.shape[-1:] != (width,):
        return None
    tokens = x.numel() // width
    if not 0 < tokens <= FEW or select.numel() != tokens * units:
        return None
    x = x if x.is_contiguous() else x.contiguous()
    return x, select if select.is_contiguous() else select.contiguous(), tokens
