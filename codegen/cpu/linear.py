"""Routed linear on CPU, for one to eight tokens: scores, cut, and the sum over live rows, in C.

``rows.c`` does what :class:`sparsify.runtime.inputs.RoutedLinear` does: subtract the centre, score
``|x - centre| * scale``, keep what is above the threshold (or the k highest), and add up the live
rows of ``columns`` (in, out), the offset and the bias. Beyond eight tokens nearly every row is live
for some token, and eager's masked product runs. So it does for fewer where enough is live and it
was measured to be faster (:mod:`sparsify.codegen.cpu.choice`).

int8: one scale per row, ``columns[j] ~ q[j] * s[j]`` with ``s[j] = max |columns[j]| / 127``. It is
asked for, never chosen, since it changes results, and it is the one case with a copy of weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
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
    version,
)
from sparsify.codegen.cpu.projections import Group, Projection
from sparsify.core import Refused
from sparsify.runtime.changes import Changes
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.rules import TopK
from sparsify.runtime.rules_cut import Threshold
from sparsify.runtime.spec import Binding

THRESHOLD = -1  # in place of a count; as in rows.c


class Routed(ctypes.Structure):
    """``routed`` of rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "matrix offset bias dropped scale centre".split()),
        *((name, ctypes.c_void_p) for name in "row_scale places".split()),
        *((name, ctypes.c_int64) for name in "rows out units".split()),
    ]


class LinearKernel(Lowered):
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
        self.kind = (self.inputs, self.dtype, int8)  # what can be run in one call
        self.run = function("rows", "routed_linears", self.dtype, "plpli", int8=int8)
        name = str(self.dtype).removeprefix("torch.")
        self.key = f"linear-{self.inputs}x{self.outputs}-{name}"
        self.dense = not int8  # another result: nothing to choose
        self.cuts: Cuts = NEVER
        self.forget()

    def __call__(self, module: RoutedLinear, x: Tensor) -> Tensor | None:
        found = self.together((module,), x)
        return None if found is None else found[0]

    def together(self, modules: Sequence[RoutedLinear], x: Tensor) -> list[Tensor] | None:
        """What each of ``modules`` makes of the same x (..., in), in one C call.

        The first module is this kernel's. None where one of them has to run by itself: other sizes
        or dtypes, eager or dense ways.
        """
        if not plain(x, self.dtype):
            return None
        group = self._groups.get(len(modules))
        if group is None or not group.holds(modules, x.shape):
            group = self._grouped(modules, x)
            if group is None:
                return None
            self._groups[len(modules)] = group
        if group.dense:
            return [self._dense(modules[0], x.reshape(group.tokens, -1)).view(group.shapes[0])]
        return group.compute(x if x.is_contiguous() else x.contiguous())

    def bind(self, modules: Sequence[RoutedLinear]) -> Binding | None:
        """:meth:`together` while nothing changes; None where it would decline."""
        if any(module.dispatch != "auto" for module in modules):
            return None
        modules, alone, dtype = tuple(modules), len(modules) == 1, self.dtype
        group: Group | None = None

        def call(x: Tensor) -> Any:
            nonlocal group
            known = group
            if (
                known is None or known.changes != Changes.count or known.shape != x.shape
                or x.dtype is not dtype or type(x) is not Tensor or not x.is_contiguous()
            ):  # fmt: skip
                found = self.together(modules, x)
                group = None if found is None else self._groups.get(len(modules))
                group = None if group is None or group.dense or group.modules != modules else group
                found = found or [module.forward(x) for module in modules]
            else:
                found = known.compute(x)
            return found[0] if alone else found

        return Binding(call, [tensor for module in modules for tensor in self._copied(module)])

    def _grouped(self, modules: Sequence[RoutedLinear], x: Tensor) -> Group | None:
        """What calls with such an x hand to C; None where not all of them can go there."""
        if not x.dim() or x.size(-1) != self.inputs:
            return None
        tokens, leading = x.numel() // self.inputs, tuple(x.shape[:-1])
        if not 0 < tokens <= FEW:
            return None
        changes = Changes.count  # not what it is afterwards: others may have counted meanwhile
        calls, dense = (Projection * len(modules))(), False
        shapes: list[tuple[int, ...]] = []
        copies: list[tuple[Tensor, int]] = []
        structs = []
        for call, module in zip(calls, modules, strict=True):
            kernel = module.kernel if shapes else self
            if type(kernel) is not LinearKernel or kernel.kind != self.kind:
                return None
            alone = len(modules) == 1  # then whoever calls has looked at dispatch
            ready = kernel._ready(module) if alone or module.dispatch == "auto" else None
            if ready is None:
                return None
            call.to, call.keep, call.threshold, share = ready
            dense = share >= kernel.cuts[tokens]
            if (dense and not alone) or not (dense or call.to):
                return None
            shapes.append((*leading, kernel.outputs))
            copies += [(t, version(t)) for t in self._copied(module)]
            structs.append(kernel._made)
        return Group(
            changes, tuple(modules), x.shape, tokens, tuple(shapes), tuple(copies), dense,
            self.run, calls, tuple(structs),
        )  # fmt: skip

    def _dense(self, module: RoutedLinear, rows: Tensor) -> Tensor:
        """rows (T, in) -> (T, out): dead inputs count as zero."""
        (tokens, inputs), select = rows.shape, module.select
        live = None
        pairs = tokens * inputs
        rows = select.centred(rows)
        if not select.all_live:
            live = select.live(select.scores(rows))
            pairs = int(torch.count_nonzero(live))
        module.counter.seen(tokens, inputs, pairs)
        module.counter.rows += tokens * inputs
        return self._product(module, rows, live)

    @staticmethod
    def _product(module: RoutedLinear, rows: Tensor, live: Tensor | None) -> Tensor:
        y = (rows if live is None else rows.masked_fill(~live, 0.0)) @ module.columns
        if module.offset is not None:
            y = y + module.offset
        return y if module.bias is None else y + module.bias

    def trial(
        self, module: RoutedLinear, way: Way, tokens: int, share: float
    ) -> Callable[[], Tensor]:
        """A call with that share of the inputs live; nothing is counted."""
        select = module.select
        x = torch.randn(tokens, self.inputs).to(self.dtype)
        scores = select.scores(select.centred(x))
        cut = -1.0 if share >= 1 else float(scores.flatten().quantile(1 - share))
        if way == "whole":
            return lambda: self._product(module, select.centred(x), None)
        if way == "dense":
            return lambda: self._product(
                module, select.centred(x), select.scores(select.centred(x)) > cut
            )
        made = self._struct(module, select)
        calls = (Projection * 1)()

        def run() -> Tensor:
            y = x.new_empty((tokens, self.outputs))
            calls[0].to, calls[0].y = made, y.data_ptr()
            calls[0].keep, calls[0].threshold = THRESHOLD, cut
            checked(self.run(calls, 1, x.data_ptr(), tokens, build.threads()))
            return y

        return run

    def forget(self) -> None:
        self._made: Made = UNMADE
        self._groups: dict[int, Group] = {}  # the last one of so many modules

    def _ready(self, module: RoutedLinear) -> tuple[int, int, float, float] | None:
        """The struct's address, keep, the threshold, and the live share; None for eager."""
        select = module.select
        own, rule = select.__dict__, select.selector
        if "live" in own or "scores" in own:
            return None  # watched while it trains (runtime/training.py)
        if type(rule) not in (TopK, Threshold):
            return None
        made = self._struct(module, select)
        if select.all_live:
            return made, self.inputs, 0.0, 1.0
        share = min(select.budget / self.inputs, 0.999)
        if not rule.mean:
            return made, int(select.budget), 0.0, share
        cut = select.threshold
        return None if isinstance(cut, Tensor) else (made, THRESHOLD, cut, share)

    def _struct(self, module: RoutedLinear, select: Magnitude) -> int:
        """The address of the module's struct; 0 where C cannot read its tensors."""
        parameters, buffers = module._parameters, select._buffers  # not through __getattr__
        columns, scale = parameters["columns"], buffers["scale"]
        bias, offset, centre = parameters.get("bias"), parameters.get("offset"), buffers["centre"]
        now = (
            0 if columns is None else columns.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if centre is None else centre.data_ptr(),
            *map(version, self._copied(module)),
        )
        have, made, _ = self._made
        if have == now:
            return made
        made, kept, value = 0, None, self.dtype
        wide = None if scale is None else scale.float()  # ``model.bfloat16()`` narrows it
        tensors = (columns, offset, bias, wide, centre)
        if columns is not None and usable(tensors, (value, value, value, torch.float32, value)):
            matrix, row_scale = quantised(columns) if self.int8 else (columns, None)
            struct = Routed(
                matrix=address(matrix), offset=now[1], bias=now[2], scale=address(wide),
                centre=now[4], row_scale=address(row_scale),
                rows=self.inputs, out=self.outputs, units=self.inputs,
            )  # fmt: skip
            made, kept = ctypes.addressof(struct), (struct, matrix, row_scale, wide)
        self._made = (now, made, kept)
        return made

    def _copied(self, module: RoutedLinear) -> list[Tensor]:
        """What C reads copies of."""
        scale = module.select.scale
        narrow = [] if scale is None or scale.dtype is torch.float32 else [scale]
        return [module.columns, *narrow] if self.int8 else narrow


def quantised(columns: Tensor) -> tuple[Tensor, Tensor]:
    """columns (in, out) -> int8 (in, out) and float32 (in,): one scale per row."""
    wide = columns.detach().float()
    scale = wide.abs().amax(1) / 127
    q = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round()
    return q.clamp_(-127, 127).to(torch.int8), scale
