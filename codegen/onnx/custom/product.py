"""A product that skips: rows of the matrix that only zeros meet are not read.

Which inputs count as zero is the file's own affair, by standard operators, so that this is a
``MatMul`` like any other: for projections routed by their inputs, and for sums over live units. It
gains with one token; beyond a few it is ONNX Runtime's own product, without the copy of the matrix
that a ``MatMul`` makes at load, and so slower: 576x1536, 64 tokens, one thread, 1.8 ms for 1.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.codegen.onnx.custom import DOMAIN
from sparsify.codegen.onnx.custom.files import known
from sparsify.codegen.onnx.custom.source import PRODUCT

FEW = 3  # tokens of a call for which it is faster; product_op.c's MOST_SKIPPING


def product(x: Tensor, matrix: Tensor, way: str) -> Tensor:
    """x (..., in) @ matrix (in, out); as our operator in a graph that is traced for ``custom``."""
    if way != "custom" or not torch.compiler.is_exporting():
        return x @ matrix
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{known(PRODUCT)}",
        (x, matrix),
        dtype=x.dtype,
        shape=(*x.shape[:-1], matrix.shape[1]),
        version=1,
    )
    return found
