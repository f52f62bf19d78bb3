"""Attention of live heads on CPU while decoding: one query per sequence, in C.

``attend.c`` reads the keys and values of a key/value head once for all of its live query heads, and
not at all where none is live. It knows the score programs that nearly all models have: a scale, a
mask (true = attend, or added), a softmax over the keys. Anything else (caps, position biases beside
a mask) is refused, several queries are declined: eager runs what the model wrote.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.cpu import build
from sparsify.codegen.cpu.call import DTYPES, Lowered, checked, function, plain
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program, Ref

MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}
MOST = 16  # sequences


class Routed(ctypes.Structure):
    """``routed`` of attend.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "batch heads kv_heads keys width out".split()),
        *((name, ctypes.c_int64) for name in "q_row q_head k_row k_head k_key".split()),
        *((name, ctypes.c_int64) for name in "v_row v_head v_key m_row m_head m_key".split()),
        ("scale", ctypes.c_float),
        ("mask", ctypes.c_int),
        ("safe", ctypes.c_int),
    ]


@dataclasses.dataclass(frozen=True)
class Score:
    """``softmax(scores * scale, masked)``.

    Attributes:
        mask: ``none``, ``bool`` (true = attend) or ``added``.
        safe: gives zeros, not NaN, where all keys are masked.
    """

    scale: float
    mask: str
    safe: bool

    @staticmethod
    def of(program: Program) -> Score:
        """What the program is; Refused where it is something else."""
        steps, at = list(program.steps), Ref("scores")
        scale, mask = 1.0, "none"
        keep: Ref | None = None

        def first(op: str) -> bool:
            return bool(steps) and steps[0].op == op

        while steps and steps[0].args and steps[0].args[0] == at and not steps[0].kwargs:
            step = steps[0]
            number = step.args[1] if len(step.args) == 2 else None
            if not isinstance(number, int | float) or mask != "none":
                break
            if step.op not in ("aten.mul.Tensor", "aten.div.Tensor"):
                break
            scale = scale * number if step.op == "aten.mul.Tensor" else scale / number
            at = Ref(steps.pop(0).name)
        if len(program.inputs) == 2:
            operand = Ref(program.inputs[1])
            if first("aten.logical_not.default") and steps[0].args == (operand,):
                keep = Ref(steps.pop(0).name)
                fill: Sequence[Any] = steps[0].args if first("aten.masked_fill.Scalar") else ()
                if fill == (at, keep, -math.inf):
                    mask, at = "bool", Ref(steps.pop(0).name)
            elif first("aten.add.Tensor") and (
                steps[0].args in ((at, operand), (operand, at)) and not steps[0].kwargs
            ):
                mask, at = "added", Ref(steps.pop(0).name)
        last = steps[0] if len(steps) == 1 else None
        kinds = {"aten._safe_softmax.default": True, "aten.softmax.int": False}
        if (
            last is None
            or last.op not in kinds
            or last.args[:2] != (at, -1)
            or any(a not in (None, torch.float32) for a in last.args[2:])
            or any(a not in (None, torch.float32) for a in last.kwargs.values())
            or program.output != last.name
            or len(program.inputs) != (1 if mask == "none" else 2)
        ):
            raise Refused("its scores are more than a scale, one mask and a softmax over the keys")
        return Score(scale, mask, kinds[last.op])


class AttendKernel(Lowered):
    """The kernel of one :class:`RoutedAttend`; Refused for score programs that it does not know."""

    def __init__(self, module: RoutedAttend) -> None:
        if module.causal:
            raise Refused("it is causal by position: it sees whole sequences, not decoding")
        if module.dtype not in DTYPES:
            raise Refused(f"CPU kernels are for float32 and bfloat16, not {module.dtype}")
        self.score = Score.of(module.score)
        self.run = {
            dtype: function("attend", "routed_attend", dtype, "pppppppi") for dtype in DTYPES
        }

    def __call__(
        self, module: RoutedAttend, q: Tensor, k: Tensor, v: Tensor, select: Tensor, *rest: Tensor
    ) -> Tensor | None:
        dtype = q.dtype
        if q.dim() != 4 or q.shape[2] != 1 or q.shape[0] > MOST or dtype not in DTYPES:
            return None
        batch, heads, _, width = q.shape
        kv_heads, keys, out = module.kv_heads, k.shape[2], v.shape[3]
        if (
            not all(plain(t, dtype) and t.stride(-1) == 1 for t in (q, k, v))
            or not plain(select, dtype)
            or select.numel() != batch * heads
            or k.shape != (batch, kv_heads, keys, width)
            or v.shape[:3] != (batch, kv_heads, keys)
            or not q.numel() * keys
            or len(rest) != (self.score.mask != "none")
        ):
            return None
        mask, kind, strides = None, 0, (0, 0, 0)
        if rest:
            found = self._mask(rest[0], (batch, heads, 1, keys))
            if found is None:
                return None
            mask, kind, strides = found
        made = Routed(
            batch, heads, kv_heads, keys, width, out, q.stride(0), q.stride(1), *k.stride()[:3],
            *v.stride()[:3], *strides, self.score.scale, kind, self.score.safe,
        )  # fmt: skip
        select = select if select.is_contiguous() else select.contiguous()
        y = q.new_empty((batch, heads, 1, out))
        live = checked(
            self.run[dtype](
                ctypes.byref(made), q.data_ptr(), k.data_ptr(), v.data_ptr(), select.data_ptr(),
                mask, y.data_ptr(), build.threads(),
            )
        )  # fmt: skip
        if module.dtype != dtype:
            module.dtype = dtype
        module.counter.seen(batch, heads, live)
        module.counter.rows += live
        return y

    def _mask(self, mask: Tensor, shape: tuple[int, ...]) -> tuple[int, int, Any] | None:
        """Address, kind, and strides over (B, H, S), zero where broadcast; None to decline."""
        kind = MASKS.get(mask.dtype)
        if (
            kind is None
            or (kind == 1) != (self.score.mask == "bool")
            or not plain(mask, mask.dtype)
        ):
            return None
        full = mask.expand(shape)
        return mask.data_ptr(), kind, (full.stride(0), full.stride(1), full.stride(3))
