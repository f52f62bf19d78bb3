"""From an exported program to an ONNX model (onnx-ir), by torch's own exporter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from sparsify.codegen.onnx import (
    branches,
    cached_attention,
    kv_heads,
    names,
    one_product,
    selections,
    targets,
)
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.trace import first_line, silenced
from sparsify.errors import NotExported
from sparsify.runtime.calling import CallSpec

PRODUCER = "sparsify"
REWRITES = "sparsify.rewrites"  # in a graph's notes: what was written otherwise -> how often


def translated(
    program: torch.export.ExportedProgram, call: CallSpec, opset: int, target: str = "portable"
) -> Any:
    """The ``onnx_ir.Model``: the target's operators, named inputs, outputs and sizes.

    Raises:
        NotExported: an operator has no translation; MissingDependency: the extra is missing.
    """
    need("onnx", "onnxscript", "onnx_ir")
    try:
        with torch.no_grad(), silenced():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=names.input_names(call),
                output_names=names.output_names(call),
                custom_translation_table=translations(),
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises anything
        raise _refused(error, program, call) from error
    assert made is not None
    model = made.model
    if model.opset_imports[""] != opset:  # the exporter's converter gives up silently
        raise NotExported(
            f"{call.model} cannot be written in opset {opset}",
            why=f"its operators have no form there; opset {model.opset_imports['']} works",
            help=f"opset={model.opset_imports['']}",
        )
    selections.named(model)
    branches.gathered(model)
    kv_heads.unrepeated(model)
    _name_sizes(model, call)
    _tie(model)
    model.graph.meta[REWRITES] = {
        "Attention with its cache": cached_attention.with_cache(model),
        "queries, keys and values as one product": one_product.projected(model),
    }
    _clear(model)
    _check_domains(model, targets.DOMAINS[target])
    model.producer_name = PRODUCER
    return model


def rewrites(model: Any) -> dict[str, int]:
    """What an ``onnx_ir.Model`` was given that it was not traced in, and how often."""
    return {what: count for what, count in model.graph.meta.get(REWRITES, {}).items() if count}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's table lacks: op -> how it is written."""
    (onnxscript,) = need("onnxscript")
    op = onnxscript.opset18

    def stable_sort(
        self: Any, *, stable: bool = True, dim: int = -1, descending: bool = False
    ) -> Any:
        # TopK breaks ties by the lower index, which is what stable means
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}


def _refused(
    error: Exception, program: torch.export.ExportedProgram, call: CallSpec
) -> NotExported:
    """Which operator has no translation, and where it stands."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(e) for e in chain)
    found = re.search(r"torch\.ops\.([\w.]+)|op='(\w+\.\w+)'", text)
    named = (found[1] or found[2]) if found else ""
    return NotExported(
        f"{named or call.model} cannot be written as ONNX",
        why=f"{type(chain[-1]).__name__}: {first_line(chain[-1])}",
        where=_place(program, named),
        help="leave out the pass that brings the operator in (skip=PATH keeps one region dense)",
    )


def _place(program: torch.export.ExportedProgram, op: str) -> str | None:
    """The path of the first module that calls ``op``."""
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if op and stack and str(node.target).startswith(op):
            return f"at {list(stack.values())[-1][0]}"
    return None


def _name_sizes(model: Any, call: CallSpec) -> None:
    """Give symbols of sizes their names, everywhere."""
    (ir,) = need("onnx_ir")
    shapes = [
        [d if isinstance(d, int) else d.value for d in (v.shape or ())] for v in model.graph.inputs
    ]
    found = names.size_names(call, shapes)
    values = [*model.graph.inputs]
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        dims = [
            d if isinstance(d, int) or d.value is None else names.renamed(str(d.value), found)
            for d in value.shape
        ]
        value.shape = ir.Shape(dims)


def _tie(model: Any) -> None:
    """Weights that are one tensor in the model are one in the file."""
    first: dict[Any, Any] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        if not isinstance(raw, torch.Tensor):
            continue
        key = (raw.data_ptr(), tuple(raw.shape), tuple(raw.stride()), raw.dtype)
        if raw.numel() == 0:
            continue
        if key not in first:
            first[key] = value
        elif not value.is_graph_output():
            value.replace_all_uses_with(first[key])
            del model.graph.initializers[name]


def _clear(model: Any) -> None:
    """Drop the exporter's notes (stack traces of every node); modules stay in the names."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _check_domains(model: Any, known: tuple[str, ...]) -> None:
    """Only the standard domain and ``known``, after local functions are inlined."""
    foreign = {n.domain for n in model.graph.all_nodes()} - {"", "ai.onnx", *known}
    foreign -= {key[0] for key in model.functions}
    if foreign:
        raise NotExported(
            f"operators of {', '.join(sorted(foreign))} are no part of the standard",
            help="this is a bug of the exporter: please report it",
        )
