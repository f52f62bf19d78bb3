"""The kernel of a :class:`~sparsify.runtime.attend.RoutedAttend`, for score programs it knows."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sparsify.codegen.triton.attend_ops import routed_attend
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program, Ref


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a score program does, where it is one of those that the kernels know.

    Attributes:
        scale: factor of the products. mask: the kind of its operand: none, bool, added.
        safe: whether a row without a key gives zero.
    """

    scale: float = 1.0
    mask: str = "none"
    safe: bool = False


def scores_of(program: Program) -> Scores:
    """Read ``[* scale] [mask] softmax``; Refused for anything else, with the step that it is."""

    def refuse(why: str) -> Refused:
        return Refused(
            f"its scores go through {why}: the kernel knows scale, one mask and softmax",
            suggestion="it stays eager",
        )

    found, at, dead, done = Scores(), program.inputs[0], "", False
    if len(program.inputs) > 2:
        raise refuse(f"{len(program.inputs) - 1} operands")
    operand = Ref(program.inputs[1]) if len(program.inputs) == 2 else None
    for step in program.steps:
        op, args = step.op.removeprefix("aten."), tuple(step.args)
        first, rest = args[:1] == (Ref(at),), args[1:]
        if op == "mul.Tensor" and first and found == Scores() and not done:
            if not isinstance(rest[0], int | float) or rest[0] <= 0:
                raise refuse("a factor that is not a positive number")
            found = dataclasses.replace(found, scale=float(rest[0]))
        elif op == "logical_not.default" and operand is not None and args == (operand,):
            dead = step.name
            continue
        elif op == "masked_fill.Scalar" and first and rest == (Ref(dead), -math.inf) and not done:
            found = dataclasses.replace(found, mask="bool")
        elif op == "add.Tensor" and first and operand is not None and rest == (operand,):
            if done or found.mask != "none" or step.kwargs:
                raise refuse(step.op)
            found = dataclasses.replace(found, mask="added")
        elif op in ("softmax.int", "_softmax.default", "_safe_softmax.default") and first:
            if done or rest[0] != -1:
                raise refuse(f"{step.op} over another dimension")
            found, done = dataclasses.replace(found, safe=op.startswith("_safe")), True
        elif not (done and first and op in ("_to_copy.default", "to.dtype")):
            raise refuse(step.op)
        at = step.name
    if not done or program.output != at:
        raise refuse("no softmax at the end")
    if operand is not None and found.mask == "none":
        raise refuse("an operand that is no mask")
    return found


class AttendKernel:
    """The kernel of a :class:`RoutedAttend`."""

    specs = ("group_tokens", "attend_prefill", "attend_decode", "attend_join")

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def __call__(self, module: RoutedAttend, *inputs: Tensor) -> Tensor | None:
        """q, k, v, select, the mask -> (B, H, T, dv); None where eager has to run."""
        q, k, v, select, *operands = inputs
        batch, heads, tokens, width = q.shape
        mask = operands[0] if operands else None
        fits = (q.dtype == k.dtype == v.dtype) and q.numel() and k.numel()
        if not fits or max(width, v.shape[3]) > 128:
            return None
        if mask is not None and (self.scores.mask == "bool") != (mask.dtype == torch.bool):
            return None
        if module.time_major:
            select = select.reshape(tokens, batch, heads).transpose(0, 1)
        select = select.expand(batch, tokens, heads)
        module.dtype = k.dtype
        live = int((select != 0).sum())
        module.counter.seen(batch * tokens, heads, live)
        module.counter.rows += live
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        y: Tensor = routed_attend(
            q, k, v, select, mask, self.scores.scale, module.causal, self.scores.safe
        )
        return y


def lower(module: RoutedAttend) -> AttendKernel:
    """The module's kernel; Refused for a score program that it does not know."""
    if max(module.head_dim, module.value_dim) > 128:
        raise Refused(f"heads of {max(module.head_dim, module.value_dim)} are wider than 128")
    return AttendKernel(scores_of(module.score))
