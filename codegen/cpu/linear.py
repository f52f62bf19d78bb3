"""Routed linear on CPU, for one to eight tokens: scores, cut, and the sum over live rows, in C.

``rows.c`` does what :class:`sparsify.runtime.inputs.RoutedLinear` does: subtract the centre, score
``|x - centre| * scale``, keep what is above the threshold (or the k highest), and add up the live
rows of ``columns`` (in, out), the offset and the bias. Beyond eight tokens nearly every row is live
for some token, and eager's masked product runs.

int8: one scale per row, ``columns[j] ~ q[j] * s[j]`` with ``s[j] = max |columns[j]| / 127``. It is
asked for, never chosen, since it changes results, and it is the one case with a copy of weights.
"""

from __future__ import annotations

import ctypes
from typing import Any

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
from sparsify.core import Refused
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.rules import TopK
from sparsify.runtime.rules_cut import Threshold

THRESHOLD = -1  # in place of a count; as in rows.c


class Routed(ctypes.Structure):
    """``routed`` of rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "matrix offset bias dropped scale centre".split()),
        *((name, ctypes.c_void_p) for name in "row_scale places".split()),
        *((name, ctypes.c_int64) for name in "rows out units".split()),
    ]


class LinearKernel:
    """The kernel of one :class:`RoutedLinear`; Refused for rules and dtypes that it does not know.

    Args:
        int8: read an int8 copy of the weights, made here and again when they change.
    """

    def __init__(self, module: RoutedLinear, *, int8: bool = False) -> None:
        self.dtype = dtype_of(module.columns)
        self.int8 = int8
        rule = module.select.selector
        if type(rule) not in (TopK, Threshold):
            raise Refused(f"CPU kernels of projections select by threshold or top-k, not {rule}")
        self.inputs, self.outputs = module.columns.shape
        self.run = function("rows", "routed_linear", self.dtype, "pppllfi", int8=int8)
        self._made: tuple[Pointers, Routed | None] = ((), None)
        self._turned: tuple[Any, int] = (None, 0)

    def __call__(self, module: RoutedLinear, x: Tensor) -> Tensor | None:
        inputs = self.inputs
        if not plain(x, self.dtype) or x.shape[-1:] != (inputs,):
            return None
        tokens = x.numel() // inputs
        if not 0 < tokens <= FEW:
            return None
        select: Magnitude = module._modules["select"]  # type: ignore[assignment]
        keep = self._keep(select)
        threshold = select.threshold if keep == THRESHOLD else 0.0
        made = self._struct(module, select)
        if made is None or keep is None or isinstance(threshold, Tensor):
            return None
        x = x if x.is_contiguous() else x.contiguous()
        y = torch.empty((*x.shape[:-1], self.outputs), dtype=self.dtype)
        pairs = checked(
            self.run(
                ctypes.byref(made), x.data_ptr(), y.data_ptr(), tokens, keep, threshold,
                build.threads(),
            )
        )  # fmt: skip
        module.counter.seen(tokens, inputs, pairs)
        module.counter.rows += pairs
        return y

    def _keep(self, select: Magnitude) -> int | None:
        """How many inputs are live, or THRESHOLD; None where somebody else decides."""
        if "live" in select.__dict__ or "scores" in select.__dict__:
            return None  # watched while it trains (runtime/training.py)
        state = (select.active, select.k_exact, select.selector)
        if self._turned[0] != state:
            rule = select.selector
            if type(rule) not in (TopK, Threshold):
                return None
            keep = self.inputs
            if not select.all_live:
                keep = THRESHOLD if rule.mean else int(select.budget)
            self._turned = (state, keep)
        return self._turned[1]

    def _struct(self, module: RoutedLinear, select: Magnitude) -> Routed | None:
        columns, bias, offset = (parameter(module, n) for n in ("columns", "bias", "offset"))
        scale, centre = select._buffers["scale"], select._buffers["centre"]
        tensors = (columns, bias, offset, scale, centre)
        now = pointers(tensors)
        if self.int8 or (scale is not None and scale.dtype != torch.float32):
            now = (*now, *(0 if t is None else t._version for t in (columns, scale)))  # copies
        have, struct = self._made
        if have == now:
            return struct
        struct, value = None, self.dtype
        wide = None if scale is None else scale.float()  # ``model.bfloat16()`` narrows it
        checks = (columns, bias, offset, wide, centre)
        if columns is not None and usable(checks, (value, value, value, torch.float32, value)):
            matrix, row_scale = columns, None
            if self.int8:
                matrix, row_scale = quantised(columns)
            struct = Routed(
                matrix=matrix.data_ptr(), offset=now[2], bias=now[1], centre=now[4],
                scale=None if wide is None else wide.data_ptr(),
                row_scale=None if row_scale is None else row_scale.data_ptr(),
                rows=self.inputs, out=self.outputs, units=self.inputs,
            )  # fmt: skip
            struct.kept = (matrix, row_scale, wide)  # as long as a call may read them
        self._made = (now, struct)
        return struct


def quantised(columns: Tensor) -> tuple[Tensor, Tensor]:
    """columns (in, out) -> int8 (in, out) and float32 (in,): one scale per row."""
    wide = columns.detach().float()
    scale = wide.abs().amax(1) / 127
    q = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round()
    return q.clamp_(-127, 127).to(torch.int8), scale
