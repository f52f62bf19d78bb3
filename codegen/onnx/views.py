"""Who reads a weight, and through which changes of its layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsify.codegen.onnx import qmoe
from sparsify.codegen.onnx.needs import need

Step = tuple[str, tuple[int, ...]]  # ("transpose", order) or ("reshape", shape)


@dataclasses.dataclass(frozen=True)
class Use:
    """An operator that reads a weight.

    Attributes:
        node, place: the operator, and which of its inputs.
        steps: what happens to the weight's layout on the way; between: the nodes that do it.
        role: ``matrix`` (K, N) of a product, ``table`` of rows, ``experts`` (E, N, K) of ONNX
            Runtime's MoE, or None for anything else.
    """

    node: Any
    place: int
    steps: tuple[Step, ...]
    between: tuple[Any, ...]
    role: str | None


def uses_of(weight: Any) -> tuple[Use, ...]:
    """All operators that read an initializer, in subgraphs too."""
    return tuple(_uses(weight, tuple(int(n) for n in weight.shape), (), ()))


def _uses(
    value: Any, shape: tuple[int, ...], steps: tuple[Step, ...], between: tuple[Any, ...]
) -> Iterator[Use]:
    for node, place in value.uses():
        step = _step(node, place, shape)
        if step is not None:
            yield from _uses(node.outputs[0], _after(shape, step), (*steps, step), (*between, node))
            continue
        role = None
        if node.op_type in ("MatMul", "Gemm") and place == 1:
            role = "matrix"
        elif node.op_type == "Gather" and place == 0 and not steps and not _number(node, "axis"):
            role = "table"
        elif qmoe.reads_stack(node, place) and not steps:
            role = "experts"
        turned = role == "matrix" and _number(node, "transB")
        flipped: tuple[Step, ...] = (("transpose", (1, 0)),) if turned else ()
        yield Use(node, place, (*steps, *flipped), between, role)


def _step(node: Any, place: int, shape: tuple[int, ...]) -> Step | None:
    """What ``node`` does to a layout; None where it does anything else, or not always the same."""
    (ir,) = need("onnx_ir")
    if place != 0 or any(value.is_graph_output() for value in node.outputs):
        return None
    if node.op_type == "Transpose":
        given = node.attributes.get("perm")
        order = given.as_ints() if given is not None else range(len(shape))[::-1]
        return "transpose", tuple(order)
    if node.op_type == "Identity":
        return "reshape", shape
    if node.op_type != "Reshape":
        return None
    wanted = ir.convenience.get_const_tensor(node.inputs[1])
    if wanted is None:
        return None
    # with allowzero a zero is no sign for the old size; a weight has none
    sizes = [shape[at] if n == 0 else int(n) for at, n in enumerate(wanted.numpy().tolist())]
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(shape) // -math.prod(sizes)
    return "reshape", tuple(sizes)


def _number(node: Any, name: str) -> int:
    given = node.attributes.get(name)
    return 0 if given is None else int(given.as_int())


def _after(shape: tuple[int, ...], step: Step) -> tuple[int, ...]:
    kind, sizes = step
    return sizes if kind == "reshape" else tuple(shape[at] for at in sizes)


def viewed(array: Any, steps: Sequence[Step]) -> Any:
    """A weight as its reader sees it."""
    for kind, sizes in steps:
        array = array.reshape(sizes) if kind == "reshape" else array.transpose(sizes)
    return array


def unviewed(array: Any, steps: Sequence[Step], shape: tuple[int, ...]) -> Any:
    """The inverse of :func:`viewed` for a weight of ``shape``."""
    shapes = [shape]
    for step in steps:
        shapes.append(_after(shapes[-1], step))
    for (kind, sizes), before in zip(reversed(steps), reversed(shapes[:-1]), strict=True):
        back = kind == "reshape"
        array = array.reshape(before) if back else array.transpose(np.argsort(sizes))
    return array
