"""Routed rows and columns on CPU, for one to eight tokens: projections of live heads, in C.

``dots.c`` computes the output rows of live units only, ``rows.c`` adds up the input columns of live
units only (each times its weight), as :mod:`sparsify.runtime.heads` does. Beyond eight tokens eager
runs, which groups tokens by unit into matrix products. For fewer, where enough units are live and
it was measured to be faster (:mod:`sparsify.codegen.cpu.choice`), one dense product does.
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
    NEVER,
    UNMADE,
    Cuts,
    Lowered,
    Made,
    Way,
    address,
    checked,
    dtype_of,
    function,
    plain,
    usable,
)
from sparsify.codegen.cpu.linear import Routed
from sparsify.runtime.heads import RoutedColumns, RoutedRows

linear = torch.nn.functional.linear


class RoutedDots(ctypes.Structure):
    """``routed`` of dots.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "blocks bias others other_bias places".split()),
        *((name, ctypes.c_int64) for name in "units size n_others inputs".split()),
    ]


class HeadsKernel(Lowered):
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
    dense: bool  # whether there is a dense way; its sums are float32's as those of C
    cuts: Cuts = NEVER

    def __init__(self) -> None:
        self._made: Made = UNMADE

    @property
    def key(self) -> str:
        """Kind, sizes and dtype: what the speed depends on."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}-{self.inputs}x{self.outputs}-{self.units}-{name}"

    def __call__(self, module: Any, x: Tensor, select: Tensor) -> Tensor | None:
        found = _inputs(x, select, self.dtype, self.inputs, self.units)
        if found is None:
            return None
        x, select, tokens = found
        cut, shape = self.cuts[tokens], (*x.shape[:-1], self.outputs)
        if cut <= 1:
            pairs = int(torch.count_nonzero(select))
            if pairs >= cut * tokens * self.units:
                module.counter.seen(tokens, self.units, pairs)
                module.counter.rows += tokens * self.units
                whole = pairs == tokens * self.units
                return self._product(module, *self._rows(x, select), whole).view(shape)
        made = self._struct(module)
        if not made:
            return None
        y = x.new_empty(shape)
        pairs = self.run(
            made, x.data_ptr(), select.data_ptr(), y.data_ptr(), tokens, build.threads()
        )
        counter = module.counter
        counter.seen(tokens, self.units, checked(pairs))
        counter.rows += pairs
        return y

    def forget(self) -> None:
        self._made = UNMADE

    def trial(self, module: Any, way: Way, tokens: int, share: float) -> Callable[[], Tensor]:
        """A call with that share of the units live; nothing is counted."""
        x = torch.randn(tokens, self.inputs).to(self.dtype)
        keep = max(round(share * self.units), 1)
        best = torch.rand(tokens, self.units).topk(keep, dim=1).indices
        select = torch.zeros(tokens, self.units).scatter(1, best, 1.0).to(self.dtype)
        if way != "few":
            return lambda: self._product(module, x, select, way == "whole")
        made = self._struct(module)

        def run() -> Tensor:
            y = x.new_empty((tokens, self.outputs))
            threads = build.threads()
            self.run(made, x.data_ptr(), select.data_ptr(), y.data_ptr(), tokens, threads)
            return y

        return run

    def _rows(self, x: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(-1, self.inputs), select.view(-1, self.units)

    def _product(self, module: Any, x: Tensor, select: Tensor, whole: bool) -> Tensor:
        """x (T, in), select (T, units) -> (T, out), every unit computed.

        Args:
            whole: every unit is live for every token.
        """
        raise NotImplementedError

    def _struct(self, module: Any) -> int:
        """The address of the module's struct; 0 where C cannot read its tensors."""
        raise NotImplementedError


class RowsKernel(HeadsKernel):
    """The kernel of one :class:`RoutedRows`; Refused for dtypes that it does not know."""

    def __init__(self, module: RoutedRows) -> None:
        super().__init__()
        self.dtype = dtype_of(module.blocks)
        self.units, self.size, self.inputs = module.blocks.shape
        self.others = 0 if module.others is None else len(module.others)
        self.outputs = self.units * self.size + self.others
        self.run = function("dots", "routed_rows", self.dtype, "ppppli")
        self.dense = True

    def _product(self, module: RoutedRows, x: Tensor, select: Tensor, whole: bool) -> Tensor:
        bias = None if module.bias is None else module.bias.flatten()
        y = linear(x, module.blocks.flatten(0, 1), bias)
        if not whole:
            dead = (select == 0).unsqueeze(2)
            y = y.view(len(x), self.units, -1).masked_fill(dead, 0.0).view(len(x), -1)
        if module.others is not None:
            y = torch.cat([y, linear(x, module.others, module.other_bias)], dim=1)
        if module.places is None:
            return y
        return torch.empty_like(y).index_copy_(1, module.places, y)

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


class ColumnsKernel(HeadsKernel):
    """The kernel of one :class:`RoutedColumns`; Refused for dtypes that it does not know."""

    def __init__(self, module: RoutedColumns) -> None:
        super().__init__()
        self.dtype = dtype_of(module.blocks)
        self.units, size, self.outputs = module.blocks.shape
        self.inputs = self.units * size
        self.run = function("rows", "routed_columns", self.dtype, "ppppli")
        self.dense = self.dtype is torch.float32

    def _product(self, module: RoutedColumns, x: Tensor, select: Tensor, whole: bool) -> Tensor:
        if module.places is not None:
            x = x.index_select(1, module.places)
        parts = x.view(len(x), self.units, -1) * select.unsqueeze(2)
        dead = select == 0
        if not whole:  # whatever dead units hold, NaN too
            parts = parts.masked_fill(dead.unsqueeze(2), 0.0)
        packed, flat = module.blocks.flatten(0, 1), parts.view(len(x), -1)
        y = flat @ packed if module.bias is None else torch.addmm(module.bias, flat, packed)
        if module.dropped is not None and not whole:
            y = torch.addmm(y, dead.to(y.dtype), module.dropped)
        return y

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
