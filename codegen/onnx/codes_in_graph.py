"""Codes instead of weights: the standard's operators that read them.

Where a matrix is stored as its readers see it, ``DequantizeLinear`` stands right before them: ONNX
Runtime makes one operator of the two (``MatMulNBits``), which never holds the matrix in float32.
Experts that its MoE reads have an operator of their own (:mod:`sparsify.codegen.onnx.qmoe`).
Otherwise rows are gathered as codes and then multiplied by their scales, and a product reads
codes times scales of the whole, which a runtime makes once, at load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsify.codegen.onnx import qmoe, values
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.rounding import BLOCK
from sparsify.codegen.onnx.targets import BITS
from sparsify.codegen.onnx.weights import Plan


def put_codes(model: Any, plans: Sequence[Plan]) -> None:
    """Replace the planned initializers of an ``onnx_ir.Model`` by their codes."""
    stacks = {use: plan for plan in plans for use in _stacks(plan)}
    for plan in plans:
        if plan.as_read:
            _before_readers(model.graph, plan)
        elif not _stacks(plan):
            _by_rows(model.graph, plan)
    for node in dict.fromkeys(node for node, _ in stacks):
        first, second = (stacks[node, place] for place in qmoe.STACKS)
        qmoe.put(model.graph, node, first, second)
    for plan in plans:
        model.graph.initializers.pop(plan.value.name)


def _stacks(plan: Plan) -> list[tuple[Any, int]]:
    """The MoE operators, and which of their inputs, that read codes."""
    return [(u.node, u.place) for u in plan.uses if u.role == "experts" and plan.stored in BITS]


def _before_readers(graph: Any, plan: Plan) -> None:
    (ir,) = need("onnx_ir")
    assert plan.scales is not None
    name, blocked = plan.value.name, plan.stored == "int4"
    codes = plan.codes.astype(need("ml_dtypes")[0].int4) if blocked else plan.codes
    scales = plan.scales if blocked else plan.scales[0].astype(np.float32)
    readers = {use.node for use in plan.uses}
    first = next(node for node in graph if node in readers)
    code = _initializer(graph, name, "codes", codes)
    scale = _initializer(graph, name, "scales", scales)
    weight = _before(
        first, "DequantizeLinear", [code, _wide(first, scale)], f"{name}.dequantized",
        **({"axis": 0, "block_size": BLOCK} if blocked else {"axis": 1}),
    )  # fmt: skip
    weight.shape = ir.Shape(codes.shape)
    for use in plan.uses:
        use.node.replace_input_with(use.place, weight)
        if use.node.op_type == "Gemm":
            use.node.attributes["transB"] = ir.AttrInt64("transB", 0)
    for use in plan.uses:
        for node in reversed(use.between):
            if node.graph is not None and not node.outputs[0].uses():
                node.graph.remove(node, safe=True)


def _by_rows(graph: Any, plan: Plan) -> None:
    name = plan.value.name
    parts = [_initializer(graph, name, "codes", plan.codes)]
    if plan.scales is not None:
        parts.append(_initializer(graph, name, "scales", plan.scales))
    whole = None
    for node, place in list(plan.value.uses()):
        if node.op_type == "Gather":
            _gather(node, parts)
            continue
        if whole is None:
            whole = _product(graph[0], parts, name)
            whole.shape = plan.value.shape
        node.replace_input_with(place, whole)


def _gather(node: Any, parts: Sequence[Any]) -> None:
    """Rows of the codes and of the scales instead of rows of the weight."""
    old, name = node.outputs[0], node.outputs[0].name
    rows = [
        _before(node, "Gather", [part, node.inputs[1]], f"{name}.{at}", part.dtype, axis=0)
        for at, part in enumerate(parts)
    ]
    values.take_over(old, _product(node, rows, name))
    node.graph.remove(node, safe=True)


def _product(node: Any, parts: Sequence[Any], name: str) -> Any:
    """Codes, times their scales where they have some, in float32, before ``node``."""
    wide = [_wide(node, part) for part in parts]
    return wide[0] if len(wide) == 1 else _before(node, "Mul", wide, f"{name}.dequantized")


def _wide(node: Any, part: Any) -> Any:
    (ir,) = need("onnx_ir")
    if part.dtype == ir.DataType.FLOAT:
        return part
    return _before(node, "Cast", [part], f"{part.name}.float32", to=ir.DataType.FLOAT)


def _before(
    node: Any, kind: str, inputs: list[Any], name: str, dtype: Any = None, **attributes: Any
) -> Any:
    """The output of a new node before ``node``: float32, unless said otherwise."""
    (ir,) = need("onnx_ir")
    made = ir.node(kind, inputs, attributes, name=name)
    made.outputs[0].name = name
    made.outputs[0].type = ir.TensorType(dtype or ir.DataType.FLOAT)
    node.graph.insert_before(node, made)
    return made.outputs[0]


def _initializer(graph: Any, name: str, part: str, array: Any) -> Any:
    (ir,) = need("onnx_ir")
    tensor = ir.tensor(np.ascontiguousarray(array), name=f"{name}.{part}")
    return values.initializer(graph, tensor)
