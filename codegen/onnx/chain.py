"""A routed feed-forward layer in one of its forms as a small model: copies of it in a chain.

What is timed (:mod:`sparsify.codegen.onnx.timing`) is written as it will be written into a file, by
the same functions: the form, the translation, the rounding of weights. The copies have weights of
their own, so that each reads its own from memory, as layers of a model do; and the next one reads
``x`` plus a little of what the last one gave, so that they run one after the other.

Random inputs would not select as text does, so the selection is given: the router computes its
own, which costs what it costs, and another input says which experts are live.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.codegen.onnx import translate
from sparsify.codegen.onnx.codes_in_graph import put_codes
from sparsify.codegen.onnx.forms import into_forms
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.trace import silenced
from sparsify.codegen.onnx.values import initializer
from sparsify.codegen.onnx.weights import LEAST, planned
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.calling import ModuleCall, Slot
from sparsify.runtime.conditioned import ConditionedFFN
from sparsify.runtime.ffn import RoutedFFN

NAMES = ("x", "given")
SMALL = 1e-3  # of an output's tanh that the next copy reads: chained squares would overflow


class Timed(nn.Module):
    """x (1, T, D), given (1, T, N) -> (1, T, D): the layer's form with the selection ``given``."""

    def __init__(self, ffn: RoutedFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        ffn: Any = self.ffn
        if ffn.way == "dense":
            dense: Tensor = ffn._every(x)
            return dense
        select, scores = given, None
        if not isinstance(ffn, ConditionedFFN):  # one row per sample: nothing, per token
            estimated = ffn.slopes is not None
            scores = ffn.router.scores(x) if estimated else None
            own = ffn.router(x) if scores is None else ffn.router(x, scores)
            select = torch.where(own > 1e30, own, given)  # never, but nobody can know
        routed: Tensor = ffn.routed(x, select, scores)
        return routed


def alone(ffn: RoutedFFN, way: str) -> Timed:
    """A copy of the layer, its weights shared, in its form."""
    shared: dict[int, Any] = {id(t): t for t in (*ffn.parameters(), *ffn.buffers())}
    timed = Timed(copy.deepcopy(ffn, shared)).eval()
    if way == "dense":
        for part in dials(timed.ffn):
            part.set_active(1.0, warn=False)
    into_forms(timed, way)
    return timed


def dials(ffn: RoutedFFN) -> list[Budgeted]:
    """What is turned to one where the layer is to be dense."""
    return [ffn.router] if ffn.inside is None else [ffn.router, ffn.inside]


def chained(ffn: RoutedFFN, way: str, copies: int, opset: int, weights: str = "float32") -> Any:
    """The ``onnx_ir.Model`` of ``copies`` copies, weights stored as ``weights`` says.

    Inputs: x (1, T, D) and a selection (1, T, N) for each copy, as
    :func:`input_names` says. Output: what the last copy gives.
    """
    timed, tokens = alone(ffn, way), torch.export.Dim.AUTO
    example = (torch.zeros(1, 3, ffn.width), torch.ones(1, 3, ffn.experts))
    free = ({1: tokens}, {1: tokens})
    with torch.no_grad(), silenced():
        program = torch.export.export(timed, example, dynamic_shapes=free, strict=False)
    slots = tuple(Slot(n, (1, None, e.shape[2])) for n, e in zip(NAMES, example, strict=True))
    call = ModuleCall(slots, NAMES, {}, {"kind": "tensor"})
    made = translate.translated(program, call, opset, "ort-custom")
    if weights != "float32":
        plans, _ = planned(made, weights, timed)
        put_codes(made, plans)
    _repeat(made, copies)
    return made


def input_names(copies: int) -> tuple[str, ...]:
    """Names: x, then the selections."""
    return (NAMES[0], NAMES[1], *(_of(NAMES[1], at) for at in range(1, copies)))


def _of(name: str, at: int) -> str:
    return f"{name}.{at}"


def _repeat(model: Any, copies: int) -> None:
    graph = model.graph
    nodes, held = list(graph), list(graph.initializers.values())
    x, given, y = graph.inputs[0], list(graph.inputs[1:]), graph.outputs[0]
    for at in range(1, copies):
        known: dict[Any, Any] = {x: _next(graph, x, graph.outputs[0], at)}
        for value in given:
            known[value] = _value(_of(value.name, at), value)
            graph.inputs.append(known[value])
        for value in held:
            known[value] = _copied(graph, value, at)
        for node in nodes:
            _again(graph, node, known, at)
        graph.outputs[0] = known[y]


def _next(graph: Any, x: Any, y: Any, at: int) -> Any:
    """x plus a little of y: what a copy reads.

    By tanh, since with a Clip there ONNX Runtime makes no one operator of codes and product.
    """
    (ir,) = need("onnx_ir")
    made, small = y, _constant(graph, _of("small", at), SMALL)
    for kind, beside in (("Tanh", []), ("Mul", [small]), ("Add", [x])):
        node = ir.node(kind, [made, *beside], name=_of(kind, at))
        made = node.outputs[0]
        made.name, made.type, made.shape = node.name, x.type, x.shape
        graph.append(node)
    return made


def _again(graph: Any, node: Any, known: dict[Any, Any], at: int) -> None:
    """One node more, reading what ``known`` says."""
    (ir,) = need("onnx_ir")
    made = ir.node(
        node.op_type, [known.get(value, value) for value in node.inputs], dict(node.attributes),
        domain=node.domain, num_outputs=len(node.outputs), name=_of(node.name, at),
    )  # fmt: skip
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name, new.type, new.shape = _of(old.name, at), old.type, old.shape
        known[old] = new
    graph.append(made)


def _copied(graph: Any, value: Any, at: int) -> Any:
    """An initializer with the same numbers, those of weights in another order.

    ONNX Runtime packs equal weights once, and the copies would find them in the cache.
    """
    (ir,) = need("onnx_ir")
    held, name = value.const_value, _of(value.name, at)
    array = held.numpy()
    if array.size >= LEAST and array.dtype != np.int64:
        array = np.roll(array.reshape(-1), at).reshape(array.shape)
    tensor = ir.Tensor(array, dtype=held.dtype, shape=held.shape, name=name)
    return initializer(graph, tensor)


def _constant(graph: Any, name: str, number: float) -> Any:
    (ir,) = need("onnx_ir")
    return initializer(graph, ir.tensor(np.float32(number), name=name))


def _value(name: str, like: Any) -> Any:
    (ir,) = need("onnx_ir")
    return ir.Value(name=name, shape=like.shape, type=like.type)
