"""Queries, keys and values as one product: three readers of the same rows share their start.

``MatMul`` by the three matrices side by side, then ``Split``. What it saves is in
:mod:`sparsify.codegen.onnx.cached_attention`; the two products of a gated feed-forward layer gain
nothing by it (ten layers: 0.97 to 1.00 of the time, with an order of loading that could be all of
that). Every output keeps its own column, so codes and scales of rounded weights are those
of the three.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.values import initializer, take_over

PARTS = "sparsify.parts"  # in a value's notes: the initializers that it is made of


def projected(model: Any) -> int:
    """Let the queries, keys and values of every ``Attention`` be one product; how many were."""
    found = 0
    for node in list(model.graph):
        heads = [node.attributes.get(f"{name}_num_heads") for name in ("q", "kv")]
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx") and None not in heads:
            found += _as_one(model.graph, node)
    if found:
        model.graph.sort()
    return found


def _as_one(graph: Any, node: Any) -> bool:
    (ir,) = need("onnx_ir")
    products = [p for value in node.inputs[:3] if (p := _product(value)) is not None]
    if len(set(products)) < 3 or len({p.inputs[0] for p in products}) > 1:
        return False
    weights = [p.inputs[1] for p in products]
    if not all(_own(weight) for weight in weights):
        return False
    arrays = [weight.const_value.numpy() for weight in weights]
    if len({(array.ndim, array.dtype, array.shape[0]) for array in arrays}) > 1:
        return False
    name = "+".join(str(weight.name) for weight in weights)
    value = initializer(graph, ir.tensor(np.concatenate(arrays, axis=1), name=name))
    value.meta[PARTS] = weights
    sizes = ir.tensor(np.array([array.shape[1] for array in arrays]), name=f"{name}.sizes")
    apart = initializer(graph, sizes)
    whole = ir.node("MatMul", [products[0].inputs[0], value], name=f"{name}.product")
    parts = ir.node("Split", [whole.outputs[0], apart], {"axis": -1}, num_outputs=3, name=name)
    whole.outputs[0].name = f"{name}.together"
    whole.outputs[0].type = products[0].outputs[0].type
    first = next(other for other in graph if other in products)
    graph.insert_before(first, [whole, parts])
    for old, new in zip(products, parts.outputs, strict=True):
        take_over(old.outputs[0], new)
        graph.remove(old, safe=True)
    for weight in weights:
        graph.initializers.pop(weight.name)
    return True


def _product(value: Any) -> Any | None:
    """The ``MatMul`` that gives queries, keys or values, before positions are in them."""
    node = value.producer()
    if node is not None and node.op_type == "RotaryEmbedding":
        node = node.inputs[0].producer()
    plain = node is not None and node.op_type == "MatMul" and not node.outputs[0].is_graph_output()
    return node if plain else None


def _own(weight: Any) -> bool:
    """Whether it is a matrix of the file's that nothing else reads."""
    return bool(
        weight is not None and weight.is_initializer() and not weight.is_graph_output()
        and len(list(weight.uses())) == 1 and len(weight.const_value.shape) == 2
    )  # fmt: skip
