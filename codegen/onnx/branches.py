"""Skipping with standard operators: a unit computes on the rows of the tokens that use it.

A form calls :func:`summed` with what one unit computes, row by row. In torch nothing is skipped:
every unit computes all rows, and those where it is dead are left out of the sum. A traced graph
holds one unit between markers; in the file (:func:`gathered`) it stands once per unit, each with
its own slice of the weights, between a gather of the rows of its tokens and a scatter that adds
their sums. A unit that no token uses multiplies no rows: ONNX Runtime's products return at once,
and its weights are not read.

Tried, ONNX Runtime 1.32, one thread, half of the experts live, milliseconds of one token (dense;
this; an ``If`` around every expert; a ``Loop`` over live experts that gathers the weights of one):
2048/8192 in 8 experts 10.3, 5.4, 5.3; in 64 10.0, 6.0, 6.2, 7.7; 576/1536 in 8 0.72, 0.49, 0.59;
in 64 0.76, 1.35, 1.63, 0.92. Beyond its weights an expert costs some 15 us, live ones and dead ones
on average (19 in an ``If``): many small experts are no faster than dense this way. Gate and up as
one product: the same for large experts, a tenth faster for small ones, for a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.values import initializer

DOMAIN = "sparsify.traced"  # in no file: gathered() replaces its operators


def summed(
    total: Tensor,
    x: Tensor,
    weights: Tensor,
    packed: Sequence[Tensor | None],
    unit: Callable[..., Tensor],
    *,
    weigh: bool,
) -> Tensor:
    """``total`` plus, for every token, the sum of the units that it uses.

    Args:
        total: (T, D); x: (T, ...); weights: (T, N), 0 where a unit is dead.
        packed: (N, ...) weights of the units.
        unit: rows of x and each of ``packed`` without its first dimension -> rows of (T, D).
        weigh: multiply by the weights; otherwise they are one.
    """
    live = weights != 0
    if torch.compiler.is_exporting():
        parts = [None if p is None else _marker("Part", (p,), p[0]) for p in packed]
        y = unit(_marker("Enter", (x, live), x), *parts)
        inputs = (total, y, live, weights) if weigh else (total, y, live)
        return _marker("Leave", inputs, total)
    for at in range(weights.shape[1]):
        y = unit(x, *(None if p is None else p[at] for p in packed))
        y = y * weights[:, at : at + 1] if weigh else y
        total = total + y.masked_fill(~live[:, at : at + 1], 0.0)
    return total


def _marker(name: str, inputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, dtype=like.dtype, shape=like.shape, version=1
    )
    return found


def gathered(model: Any) -> int:
    """Write the units of an ``onnx_ir.Model`` out; how many there were."""
    graph, found = model.graph, 0
    for node in list(graph):
        if _is(node, "Leave"):
            _Units(graph, node, f"units_{found}").write()
            found += 1
    for node in reversed(list(graph)) if found else ():  # the one unit that was traced
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        read = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in read:
            if value.is_initializer() and not value.uses():
                graph.initializers.pop(value.name, None)
    model.opset_imports.pop(DOMAIN, None)
    return found


def _is(node: Any, kind: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == kind)


class _Units:
    """What stands before one ``Leave``, to be written once per unit."""

    def __init__(self, graph: Any, leave: Any, name: str) -> None:
        (self.ir,) = need("onnx_ir")
        self.graph, self.place, self.name, self.made = graph, leave, name, 0
        self.total, self.y, live, *weights = leave.inputs
        self.units = int(live.shape[1])
        self.body = _region(self.y)
        turned = self.add("Transpose", [live], {"perm": [1, 0]})
        pairs = self.add("Transpose", [self.add("NonZero", [turned])], {"perm": [1, 0]})
        counted = self.add("Cast", [live], {"to": self.ir.DataType.INT64})
        self.counts = self.add("ReduceSum", [counted, self.number(0)], {"keepdims": 0})
        # pairs (P, 2): units ascending, and the tokens of each
        self.at = self.split(self.add("Gather", [pairs, self.number(1)], {"axis": 1}))
        self.weights: Any = None
        if weights:
            turned = self.add("Transpose", weights, {"perm": [1, 0]})
            flat = self.add("GatherND", [turned, pairs])
            self.weights = self.split(self.add("Unsqueeze", [flat, self.number(1)]))

    def write(self) -> None:
        """Every unit, and the last one's sum for the marker's output."""
        total, was = self.total, self.place.outputs[0]
        for unit in range(self.units):
            total = self.one(unit, total)
        total.type, total.shape = was.type, was.shape
        was.replace_all_uses_with(total, replace_graph_outputs=True)
        self.graph.remove(self.place, safe=True)

    def one(self, unit: int, total: Any) -> Any:
        """``total`` with one unit's rows added.

        Every unit has a scatter of its own, whose rows are all different: where rows repeat, two
        threads of ONNX Runtime's ScatterND lose sums (1.32; one scatter of all units was wrong in
        every third call).
        """
        known: dict[Any, Any] = {}
        for node in self.body:
            inputs = [self.own(value, unit, known) for value in node.inputs]
            made = self.ir.node(
                node.op_type, inputs, node.attributes, domain=node.domain,
                num_outputs=len(node.outputs),
            )  # fmt: skip
            self.put(made)
            for old, new in zip(node.outputs, made.outputs, strict=True):
                known[old] = new
                new.type = old.type
        y = self.own(self.y, unit, known)
        if self.weights is not None:
            y = self.add("Mul", [y, self.weights[unit]])
        return self.add("ScatterND", [total, self.at[unit], y], {"reduction": "add"})

    def own(self, value: Any, unit: int, known: dict[Any, Any]) -> Any:
        """What a unit reads in place of ``value``."""
        node = None if value is None or value in known else value.producer()
        if node is not None and _is(node, "Enter"):
            known[value] = self.add("GatherND", [node.inputs[0], self.at[unit]])
        elif node is not None and _is(node, "Part"):
            known[value] = self.part(node.inputs[0], unit)
        return known.get(value, value)

    def part(self, packed: Any, unit: int) -> Any:
        """A unit's slice of an initializer, as one of its own."""
        name = f"{packed.name}_{unit}"
        if name not in self.graph.initializers:
            initializer(self.graph, self.ir.tensor(packed.const_value.raw[unit], name=name))
        return self.graph.initializers[name]

    def split(self, pairs: Any) -> Any:
        """(P, 1) -> of each unit (n, 1)."""
        node = self.ir.node("Split", [pairs, self.counts], {"axis": 0}, num_outputs=self.units)
        self.put(node)
        return node.outputs

    def number(self, value: int) -> Any:
        """(1,) of it."""
        return self.add("Constant", [], {"value_ints": [value]})

    def add(self, kind: str, inputs: list[Any], attributes: Any = None) -> Any:
        """The output of a new node."""
        node = self.ir.node(kind, inputs, attributes or {})
        self.put(node)
        return node.outputs[0]

    def put(self, node: Any) -> None:
        """In front of the marker, with names of its own."""
        node.name = f"{self.name}_{self.made}"
        for part, value in enumerate(node.outputs):
            value.name = f"{node.name}_{part}"
        self.made += 1
        self.graph.insert_before(self.place, node)


def _region(y: Any) -> list[Any]:
    """The nodes that a unit's ``y`` needs and that depend on its rows or weights, in order."""
    inside: dict[Any, bool] = {}

    def depends(value: Any) -> bool:
        node = None if value is None else value.producer()
        if node is None or _is(node, "Leave"):
            return False
        if node.domain == DOMAIN:
            return True
        if node not in inside:
            held = [depends(value) for value in node.inputs]  # of all: no short cut
            inside[node] = any(held)
        return inside[node]

    depends(y)
    return [node for node in y.producer().graph if inside.get(node)]
