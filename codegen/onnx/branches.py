"""Skipping with standard operators: an ``If`` around the work of a unit that no token uses.

A form writes ``inside = enter(x, live, some)``, computes row by row, and ends with
``total = leave(total, y, live, some)``. In torch nothing is skipped: ``enter`` gives all rows, and
``leave`` adds those where ``live``. In the file (:func:`outlined`) everything between the two
stands in the branch of an ``If`` on ``some``, between a gather of the live rows and a scatter of
their sums: a unit that is dead for every token costs one comparison, and its weights are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.onnx.needs import need

DOMAIN = "sparsify"  # in no file: outlined() replaces its operators


def enter(x: Tensor, live: Tensor, some: Tensor) -> Tensor:
    """x (T, ...), live bool (T,), some bool () = any live -> the rows that may be computed."""
    if not torch.compiler.is_exporting():
        return x
    return _marker("Enter", (x, live, some), x)


def leave(total: Tensor, y: Tensor, live: Tensor, some: Tensor) -> Tensor:
    """total (T, D) plus the rows of y that are live."""
    if not torch.compiler.is_exporting():
        return total + y.masked_fill(~live.unsqueeze(1), 0.0)
    return _marker("Leave", (total, y, live, some), total)


def _marker(name: str, inputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, dtype=like.dtype, shape=like.shape, version=1
    )
    return found


def outlined(model: Any) -> int:
    """Put every branch of an ``onnx_ir.Model`` into an ``If``; how many there were."""
    graph, found = model.graph, 0
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "Leave":
            _outline(graph, node, found)
            found += 1
    for node in reversed(list(graph)):  # entries moved into their branches as gathers
        if node.domain == DOMAIN:
            graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    return found


def _outline(graph: Any, leave_node: Any, number: int) -> None:
    (ir,) = need("onnx_ir")
    total, y, live, some = leave_node.inputs
    body, gathers = _region(y), list[Any]()
    rows = ir.node("NonZero", [live])
    at = ir.node("Transpose", [rows.outputs[0]], {"perm": [1, 0]})
    for node in body:
        for place, value in enumerate(node.inputs):
            entry = None if value is None else value.producer()
            if entry is None or not _is(entry, "Enter"):
                continue
            gather = ir.node("GatherND", [entry.inputs[0], at.outputs[0]])
            gathers.append(gather)
            node.replace_input_with(place, gather.outputs[0])
    if not body:  # y is an entry itself
        gathers.append(ir.node("GatherND", [y.producer().inputs[0], at.outputs[0]]))
        y = gathers[-1].outputs[0]
    added = ir.node("ScatterND", [total, at.outputs[0], y], {"reduction": "add"})
    kept = ir.node("Identity", [total])
    graph.remove(body, safe=False)
    nodes = [rows, at, *gathers, *body, added]
    for count, node in enumerate(nodes):
        node.name = f"branch_{number}_{count}"
        for part, value in enumerate(node.outputs):
            value.name, value.shape = f"branch_{number}_{count}_{part}", None
    kept.name, kept.outputs[0].name = f"branch_{number}_else", f"branch_{number}_kept"
    then = ir.Graph((), added.outputs, nodes=nodes, name=f"branch_{number}")
    otherwise = ir.Graph((), kept.outputs, nodes=[kept], name=f"branch_{number}_dead")
    for value in (*added.outputs, *kept.outputs):
        value.type, value.shape = total.type, leave_node.outputs[0].shape
    chosen = ir.node(
        "If", [some], {"then_branch": then, "else_branch": otherwise}, name=f"if_{number}"
    )
    was = leave_node.outputs[0]
    now = chosen.outputs[0]
    now.name, now.type, now.shape = was.name, was.type, was.shape
    graph.insert_before(leave_node, chosen)
    was.replace_all_uses_with(now, replace_graph_outputs=True)
    graph.remove(leave_node, safe=True)


def _is(node: Any, kind: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == kind)


def _region(y: Any) -> list[Any]:
    """The nodes between the entries and ``y``, in order."""
    inside: dict[Any, bool] = {}

    def depends(value: Any) -> bool:
        node = None if value is None else value.producer()
        if node is None or _is(node, "Leave"):
            return False
        if _is(node, "Enter"):
            return True
        if node not in inside:
            held = [depends(value) for value in node.inputs]  # of all: no short cut
            inside[node] = any(held)
        return inside[node]

    depends(y)
    graph = y.producer().graph
    return list(_ordered(graph, {node for node, held in inside.items() if held}))


def _ordered(graph: Any, nodes: set[Any]) -> Iterator[Any]:
    left = len(nodes)
    for node in graph:
        if not left:
            return
        if node in nodes:
            left -= 1
            yield node
