"""Experts in 8 or 4 bits as one operator of ONNX Runtime's: com.microsoft ``QMoE``.

It takes the place of ``MoE`` (:mod:`sparsify.codegen.onnx.moe`) where both stacks of its weights
are codes, and skips as that does: an expert whose share of a token is zero is not read. Codes lie
as (E, outputs, inputs) with one scale per block of inputs, the same block size in both products;
neurons are added, all zeros, until their count is whole blocks. Where scales are per output, as at
8 bits, every block of an output has the same one.

Measured, ONNX Runtime 1.32, half of the experts live (a quarter of all by every token, as a dense
layer), milliseconds at 8 bits: dense; experts as gathered rows; this. 2048/8192, one token, one
thread: in 8 experts 3.40, 2.11, 1.79, in 64 3.41, 2.68, 1.91; two threads 2.07, 1.49, 1.29 and
2.03, 2.53, 1.31. 8 tokens, one thread: 8.6, 5.7, 4.7 and 8.8, 7.1, 5.7, where MoE in float32 is
slower than its dense layer. 576/1536, one token, one thread: in 8 0.24, 0.26, 0.20, in 64 0.22,
0.80, 0.26. At 4 bits 2048/8192 in 8 2.42, 1.49, 1.46, in 64 2.42, 2.11, 1.40; 576/1536 in 8 0.18,
0.24, 0.18, in 64 0.17, 0.79, 0.24. So it is the fastest but for small layers in many experts, and
for those on two threads, where the dense layer is.

The kernel has products of its own for blocks only; without them it makes every expert that is used
in float32, in every call. At 4 bits it rounds activations to 8 bits where ``accuracy_level`` asks
for it, which is what ONNX Runtime does by itself in products with codes; at 8 bits it always does.
Its variable ``ORT_QMOE_CPU_QNBIT_GEMM=fp32``, read when a session is made, has it compute in
float32: equal to ``MoE`` with the values that the codes stand for (1e-7).
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.codegen.onnx import values
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.rounding import BLOCK
from sparsify.codegen.onnx.targets import BITS

if TYPE_CHECKING:
    from sparsify.codegen.onnx.weights import Plan

DOMAIN = "com.microsoft"
STACKS = (2, 4)  # of MoE's inputs: (E, m or 2 m, D) and (E, D, m)
BIAS = 3
SIZES = (16, 32, 64, 128, 256)  # of blocks, that there are kernels for
FAST = 4  # accuracy_level: activations in 8 bits
VARIABLE = "ORT_QMOE_CPU_QNBIT_GEMM"


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Sessions that are made inside compute these operators in float32."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "fp32"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def reads_stack(node: Any, place: int) -> bool:
    """Whether that input of a node is a stack of experts' weights."""
    return bool(node.op_type == "MoE" and node.domain == DOMAIN and place in STACKS)


def block_of(node: Any, bits: int) -> int | None:
    """Inputs per scale for a ``MoE`` node in codes: the fewest bytes; None where there are none."""
    stacks = [node.inputs[place] for place in STACKS]
    bias = node.inputs[BIAS]
    if (
        any(v is None or not v.is_initializer() for v in stacks)
        or len(node.inputs) > max(STACKS) + 1
    ):
        return None
    if bias is not None and not bias.is_initializer():
        return None
    width, hidden = (int(stack.shape[2]) for stack in stacks)
    sizes = [size for size in (SIZES if bits == 8 else (BLOCK,)) if width % size == 0]
    return min(sizes, key=lambda size: -(-hidden // size) * (size + 4), default=None)


def paired(plans: Sequence[Plan]) -> list[Plan]:
    """Without those of stacks whose node has another that is not in codes."""
    kept = list(plans)
    while True:
        read = Counter(use.node for p in kept for use in p.uses if use.role == "experts")
        alone = [
            p for p in kept
            if any(use.role == "experts" and read[use.node] < len(STACKS) for use in p.uses)
        ]  # fmt: skip
        if not alone:
            return kept
        kept = [p for p in kept if p not in alone]


def put(graph: Any, node: Any, first: Plan, second: Plan) -> None:
    """Replace a ``MoE`` node, whose stacks are planned, by ``QMoE``."""
    (ir,) = need("onnx_ir")
    bits = BITS[first.stored]
    block = block_of(node, bits)
    assert block is not None
    more = -second.codes.shape[2] % block  # neurons, and of the first product's rows
    rows = more * (first.codes.shape[1] // second.codes.shape[2])
    short = bias = node.inputs[BIAS]
    if bias is not None and rows:
        wide = np.pad(bias.const_value.numpy(), ((0, 0), (0, rows)))
        bias = _initializer(graph, f"{bias.name}.padded", wide)
    inputs = [*node.inputs[:2]]
    for plan, pad in ((first, ((0, 0), (0, rows), (0, 0))), (second, ((0, 0), (0, 0), (0, more)))):
        codes = np.pad(plan.codes, pad)
        assert plan.scales is not None
        scales = np.pad(plan.scales.astype(np.float32), (*pad[:2], (0, 0)), constant_values=1.0)
        scales = np.repeat(scales, codes.shape[2] // block // scales.shape[2], axis=2)
        name = plan.value.name
        inputs.append(_initializer(graph, f"{name}.codes", _packed(codes, bits)))
        inputs.append(_initializer(graph, f"{name}.scales", scales))
        inputs += [bias] if plan is first else []
    attributes = {
        **dict(node.attributes), "expert_weight_bits": bits, "block_size": block,
        **({"accuracy_level": FAST} if bits == 4 else {}),
    }  # fmt: skip
    made = ir.node("QMoE", inputs, attributes, domain=DOMAIN, name=node.name)
    node.graph.insert_before(node, made)
    values.take_over(node.outputs[0], made.outputs[0])
    node.graph.remove(node, safe=True)
    if short is not None and not short.uses():
        graph.initializers.pop(short.name)


def _packed(codes: Any, bits: int) -> Any:
    """int8 -> uint8 around the middle; at 4 bits two in a byte, the first one low."""
    found = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return found if bits == 8 else found[..., 0::2] | (found[..., 1::2] << 4)


def _initializer(graph: Any, name: str, array: Any) -> Any:
    """That of this name, made where there is none: layers that are tied have one."""
    (ir,) = need("onnx_ir")
    if name not in graph.initializers:
        values.initializer(graph, ir.tensor(np.ascontiguousarray(array), name=name))
    return graph.initializers[name]
