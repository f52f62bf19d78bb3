"""``sparsify::routed_ffn``: the routed feed-forward layer as one operator, with autograd.

``torch.export``, ``torch.compile`` and CUDA graphs see one node; its shapes follow from its
arguments' (nothing waits for the selection).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.triton import ffn, ffn_backward, ffn_decode
from sparsify.codegen.triton.host import check_tensor, interpreted
from sparsify.codegen.triton.pairs import sort_pairs
from sparsify.core import Refused

FEW = 16  # tokens: decoding


@torch.library.custom_op("sparsify::routed_ffn", mutates_args=())
def routed_ffn(
    x: Tensor,
    select: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep: int,
) -> Tensor:
    """y (T, D) float32: ``down_bias + sum over e of select[:, e] * act(...) @ down_e``.

    Args:
        x: (T, D), any strides. select: (T, N), zero where dead.
        up, gate, down: (N, m, D), contiguous; up_bias, gate_bias: (N, m); down_bias: (D,).
        activation: :func:`sparsify.codegen.triton.activation.key_of` its program.
        keep: the most experts that any token uses, as far as is known without looking: N at most.
    """
    _check(x)
    if not len(x):
        return x.new_empty(x.shape, dtype=torch.float32)
    select = select.contiguous()
    if len(x) <= FEW:
        parts = (up, gate, down, up_bias, gate_bias, down_bias)
        return ffn_decode.decode(x, select, *parts, activation)
    slot, starts = sort_pairs(select, len(x) * keep)
    h = ffn.hidden(x, up, gate, up_bias, gate_bias, slot, starts, activation)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return ffn.scatter([(h, down)], starts, select, y, weighed=True, bias=down_bias)


@routed_ffn.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("sparsify::routed_ffn_backward", mutates_args=())
def routed_ffn_backward(
    dy: Tensor,
    x: Tensor,
    select: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    keep: int,
) -> list[Tensor]:
    """Gradients of x, select, up, gate, down, up_bias, gate_bias; empty for what is absent."""
    _check(x)
    parts = (up, gate, down, up_bias, gate_bias)
    if not len(x):
        found: list[Tensor | None] = [torch.empty_like(x), torch.empty_like(select)]
        found += [None if p is None else torch.zeros_like(p) for p in parts]
    else:
        found = ffn_backward.backward(dy, x, select.contiguous(), *parts, activation, len(x) * keep)
    return [x.new_empty(0) if f is None else f for f in found]


@routed_ffn_backward.register_fake
def _(dy: Tensor, *args: Any) -> list[Tensor]:
    x = args[0]
    contiguous = torch.contiguous_format
    return [
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=contiguous)
        for t in args[:7]
    ]


def _check(x: Tensor) -> None:
    check_tensor(x)
    if x.dtype == torch.bfloat16 and interpreted():
        # Triton 3.9's interpreter holds bfloat16 as integers, and tl.dot multiplies those.
        raise Refused("Triton's interpreter cannot multiply bfloat16 matrices")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.keep = inputs
    ctx.biased = tensors.pop() is not None
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    found = routed_ffn_backward(dy, *saved, ctx.activation, ctx.keep)
    given = [f if t is not None else None for f, t in zip(found, saved, strict=True)]
    return (*given, dy.sum(0) if ctx.biased else None, None, None)


routed_ffn.register_autograd(_backward, setup_context=_save)
