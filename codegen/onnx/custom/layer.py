"""A routed feed-forward layer as one operator of ours: live experts, the bias, and stand-ins.

The selection is the file's own: any rule, by standard operators. Weights are initializers as the
model holds them, which is how the kernels read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsify.codegen.elementwise import CannotLower
from sparsify.codegen.onnx.custom import DOMAIN
from sparsify.codegen.onnx.custom.files import known
from sparsify.codegen.onnx.custom.source import Kind
from sparsify.runtime.program import Program

# in order; operator.c's enum
INPUTS = "up down gate up_bias gate_bias down_bias dropped scores slopes".split()


def able(activation: Program) -> bool:
    """Whether the layer's activation has C code."""
    try:
        Kind.of(activation)
    except CannotLower:
        return False
    return True


def marked(
    x: Tensor, select: Tensor, tensors: Mapping[str, Tensor | None], activation: Program
) -> Tensor:
    """The operator in a traced graph.

    Args:
        x: (..., D); select: (..., N), 0 where an expert is dead.
        tensors: up, gate, down (N, m, D), up_bias, gate_bias (N, m), down_bias (D,), dropped
            (n, D) of the last n experts, scores (..., R), slopes (R, D); None or left out where
            there is none.

    Returns:
        (..., D).
    """
    up = tensors["up"]
    assert up is not None
    inputs: Sequence[Tensor | None] = (x, select, *(tensors.get(name) for name in INPUTS))
    while inputs[-1] is None:
        inputs = inputs[:-1]
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{known(Kind.of(activation))}",
        inputs,
        {"experts": up.shape[0], "neurons": up.shape[1]},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    return found
