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
from typing import Any, NamedTuple

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
from sparsify.core import Refused
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.rules import TopK
from sparsify.runtime.rules_cut import Threshold

THRESHOLD = -1  # in place of a count; as in rows.c
Ready = tuple[int, int, float, float]  # the struct's address, keep, the threshold, the live share
# A shape, how many tokens that is and in which dimensions; 0 tokens to decline
Sized = tuple[torch.Size | None, int, tuple[int, ...]]


class Routed(ctypes.Structure):
    """``routed`` of rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "matrix offset bias dropped scale centre".split()),
        *((name, ctypes.c_void_p) for name in "row_scale places".split()),
        *((name, ctypes.c_int64) for name in "rows out units".split()),
    ]


class Projection(ctypes.Structure):
    """``projection`` of rows.c: one of those that read the same x."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("to", "y")),
        *((name, ctypes.c_int64) for name in ("keep", "pairs")),
        ("threshold", ctypes.c_float),
    ]


class _Seen(NamedTuple):
    """The dial and the tensors of the last call, and what it was given."""

    turns: int
    columns: Tensor
    place: int
    offset: Tensor | None
    offset_at: int
    bias: Tensor | None
    bias_at: int
    scale: Tensor
    centre: Tensor | None
    found: Ready


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
        self._made: Made = UNMADE
        self._seen: _Seen | None = None
        self._spare: dict[int, list[Any]] = {}  # arrays of C calls, by their number
        self._sized: Sized = (None, 0, ())  # of the last input

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
        sized = self._sized
        if x.shape != sized[0]:
            sized = self._sized = self._sizes_of(x)
        _, tokens, leading = sized
        if not tokens:
            return None
        spare = self._spare.setdefault(len(modules), [])
        try:
            calls = spare.pop()  # nobody else's meanwhile
        except IndexError:
            calls = (Projection * len(modules))()
        found: list[Tensor] = []
        for call, module in zip(calls, modules, strict=True):
            kernel = module.kernel if found else self
            if type(kernel) is not LinearKernel or kernel.kind != self.kind:
                return None
            ready = kernel._ready(module)
            if ready is None:
                return None
            call.to, call.keep, call.threshold, share = ready
            if share >= kernel.cuts[tokens]:
                if len(modules) > 1:
                    return None
                return [self._dense(module, x.reshape(tokens, -1)).view(*x.shape[:-1], -1)]
            if not call.to:
                return None
            y = x.new_empty((*leading, kernel.outputs))
            call.y = y.data_ptr()
            found.append(y)
        x = x if x.is_contiguous() else x.contiguous()
        checked(self.run(calls, len(modules), x.data_ptr(), tokens, build.threads()))
        for call, module in zip(calls, modules, strict=True):
            module.counter.computed(tokens, self.inputs, call.pairs)
        spare.append(calls)
        return found

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

    def _sizes_of(self, x: Tensor) -> Sized:
        if not x.dim() or x.size(-1) != self.inputs:
            return x.shape, 0, ()
        tokens = x.numel() // self.inputs
        return x.shape, tokens if tokens <= FEW else 0, tuple(x.shape[:-1])

    def forget(self) -> None:
        self._made, self._seen, self._spare = UNMADE, None, {}

    def _ready(self, module: RoutedLinear) -> Ready | None:
        """What a call hands to C, from the last one while nothing has changed; None for eager.

        While a token is decoded, everything that is looked at here was last looked at before all
        other weights came through the caches: tensors are compared by identity, and their place is
        asked only of parameters, whose data can be replaced.
        """
        select: Magnitude = module._modules["select"]  # type: ignore[assignment]
        own = select.__dict__
        if "live" in own or "scores" in own:
            return None  # watched while it trains (runtime/training.py)
        seen = self._seen
        if seen is not None:
            turns, columns, place, offset, offset_at, bias, bias_at, scale, centre, found = seen
            now, its = module._parameters, own["_buffers"]
            if (
                own["turns"] == turns
                and now["columns"] is columns
                and columns.data_ptr() == place
                and now.get("offset") is offset
                and (offset is None or offset.data_ptr() == offset_at)
                and now.get("bias") is bias
                and (bias is None or bias.data_ptr() == bias_at)
                and its["scale"] is scale
                and its["centre"] is centre
            ):
                return found
        return self._look(module, select)

    def _look(self, module: RoutedLinear, select: Magnitude) -> Ready | None:
        """The same anew."""
        rule, threshold, self._seen = select.selector, 0.0, None
        if type(rule) not in (TopK, Threshold):
            return None
        keep, share = self.inputs, 1.0
        if not select.all_live:
            keep = THRESHOLD if rule.mean else int(select.budget)
            share = min(select.budget / self.inputs, 0.999)
            cut = select.threshold if rule.mean else 0.0
            if isinstance(cut, Tensor):  # one per unit
                return None
            threshold = cut
        found = (self._struct(module, select), keep, threshold, share)
        scale = select.scale
        if not self.int8 and scale is not None and scale.dtype is torch.float32:  # no copies
            columns, offset, bias = module.columns, module.offset, module.bias
            self._seen = _Seen(
                select.turns, columns, columns.data_ptr(), offset, address(offset),
                bias, address(bias), scale, select.centre, found,
            )  # fmt: skip
        return found

    def _struct(self, module: RoutedLinear, select: Magnitude) -> int:
        """The address of the module's struct; 0 where C cannot read its tensors."""
        parameters, buffers = module._parameters, select._buffers  # not through __getattr__
        columns, scale = parameters["columns"], buffers["scale"]
        bias, offset, centre = parameters.get("bias"), parameters.get("offset"), buffers["centre"]
        copied = 0
        if self.int8 or (scale is not None and scale.dtype is not torch.float32):
            copied = self._copied(columns, scale)
        now = (
            0 if columns is None else columns.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if centre is None else centre.data_ptr(),
            copied,
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

    def _copied(self, columns: Tensor | None, scale: Tensor | None) -> int:
        """Changes with the values of what the struct holds copies of."""
        found = version(columns) if self.int8 and columns is not None else 0
        if scale is not None and scale.dtype is not torch.float32:
            found += version(scale) << 32
        return found


def quantised(columns: Tensor) -> tuple[Tensor, Tensor]:
    """columns (in, out) -> int8 (in, out) and float32 (in,): one scale per row."""
    wide = columns.detach().float()
    scale = wide.abs().amax(1) / 127
    q = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round()
    return q.clamp_(-127, 127).to(torch.int8), scale
