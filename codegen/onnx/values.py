"""Values of an ``onnx_ir`` graph: new initializers, and one in another's place."""

from __future__ import annotations

from typing import Any

from sparsify.codegen.onnx.needs import need


def initializer(graph: Any, tensor: Any) -> Any:
    """``tensor`` (onnx_ir) as an initializer of its name."""
    (ir,) = need("onnx_ir")
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def take_over(old: Any, new: Any) -> None:
    """Let ``new`` be read wherever ``old`` is, with its name, which may be an output's."""
    new.type, new.shape = old.type, old.shape
    new.name, old.name = old.name, f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
