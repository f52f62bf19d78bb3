"""Weights in fewer bits: which initializers are rounded, and to what.

* ``float16``: stored so, and cast, once, when a runtime loads the file.
* ``int8``: codes, and one scale per output.
* ``int4``: codes, and one scale per 32 inputs of an output.

A matrix with one reader, or several that see it alike, is rounded as they see it, whatever the
model does to it on the way. What is read in several ways (an embedding that is the last layer's
matrix, too), tables of rows and stacks of matrices have int8 codes with one scale per row. Stacks
of experts that ONNX Runtime's MoE reads are rounded matrix by matrix, for its operator with codes
(:mod:`sparsify.codegen.onnx.qmoe`).
How codes are read is in :mod:`sparsify.codegen.onnx.codes_in_graph`.

Only what the model itself holds is rounded, and nothing of a router: a threshold is compared with
what its weights give.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsify.codegen.onnx import one_product, qmoe
from sparsify.codegen.onnx.custom import DOMAIN
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.rounding import Rounded, rounded
from sparsify.codegen.onnx.targets import BITS
from sparsify.codegen.onnx.views import Use, unviewed, uses_of, viewed
from sparsify.runtime.budget import Budgeted

LEAST = 1 << 10  # numbers of a matrix worth rounding


@dataclasses.dataclass(frozen=True)
class Plan:
    """One initializer to be rounded.

    Attributes:
        value: the ``onnx_ir`` initializer; uses: who reads it.
        stored: float16, bfloat16, int8 or int4.
        codes, scales: as :class:`sparsify.codegen.onnx.rounding.Rounded` has them, in the layout
            (K, N) that readers see where ``as_read``, else in the initializer's own with scales
            (..., blocks of the last size); scales None for floats.
        rounded: what they were made from; None for floats.
    """

    value: Any
    uses: tuple[Use, ...]
    stored: str
    as_read: bool
    codes: Any
    scales: Any | None
    rounded: Rounded | None

    @property
    def values(self) -> Any:
        """What codes and scales stand for: float32, in the initializer's own layout."""
        shape = tuple(int(size) for size in self.value.shape)
        if self.rounded is None:
            return self.codes.astype(np.float32)
        if self.as_read:
            return unviewed(self.rounded.values, self.uses[0].steps, shape)
        return self.rounded.values.T.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What became of a file's float weights.

    Attributes:
        precision: what was asked for.
        stored: float16, int8, int4 -> how many matrices; left: why not -> how many initializers.
    """

    precision: str
    stored: dict[str, int]
    left: dict[str, int]

    def text(self) -> str:
        """One line."""
        stored = ", ".join(f"{count} in {kind}" for kind, count in self.stored.items())
        left = ", ".join(f"{count} {why}" for why, count in self.left.items())
        return f"weights: {stored or 'none rounded'}; in float32: {left or 'none'}"


def planned(model: Any, precision: str, graph: nn.Module) -> tuple[list[Plan], Weights]:
    """What of an ``onnx_ir.Model`` is rounded to ``precision``; the model is left alone.

    Args:
        graph: of routed modules (:func:`sparsify.codegen.onnx.trace.formed`); what it holds, but
            for routers, may be rounded.
    """
    (ir,) = need("onnx_ir")
    own = Own(graph)
    plans, left = list[Plan](), collections.Counter[str]()
    for value in model.graph.initializers.values():
        if value.const_value.dtype != ir.DataType.FLOAT:
            continue
        uses = uses_of(value)
        why = _stays(value, uses, own, precision)
        if why is not None:
            left[why] += 1
            continue
        plans.append(_plan(value, uses, precision))
    if precision in BITS:
        kept = qmoe.paired(plans)
        if len(kept) < len(plans):
            left["of MoE"] += len(plans) - len(kept)
        plans = kept
    stored = collections.Counter(plan.stored for plan in plans)
    return plans, Weights(precision, dict(sorted(stored.items())), dict(sorted(left.items())))


def _stays(value: Any, uses: Sequence[Use], own: Own, precision: str) -> str | None:
    """Why an initializer stays as it is; None where it is rounded."""
    tensor = value.const_value
    if tensor.size < LEAST or len(tensor.shape) < 2:
        return "small"
    if (whose := own.whose(value)) is not None:
        return whose
    for use in uses:
        # what is stored in half is whole again when it is loaded: our operators may read it
        if use.role is None and (precision in BITS or use.node.domain != DOMAIN):
            return f"of {use.node.op_type}"
        if use.node.graph is not value.graph:
            return "read in a branch"  # no form writes one
    stacks = [use.node for use in uses if use.role == "experts"]
    if stacks and precision in BITS:
        blocks = {qmoe.block_of(node, BITS[precision]) for node in stacks}
        if len(stacks) < len(uses) or len(blocks) > 1:
            return "of MoE"
        if None in blocks:
            return "of MoE, whose inputs are no whole blocks"
    if precision == "float16" and np.abs(tensor.numpy()).max() > np.finfo(np.float16).max:
        return "too large for float16"
    return None


def _plan(value: Any, uses: tuple[Use, ...], precision: str) -> Plan:
    array = value.const_value.numpy()
    if precision not in BITS:
        kind = np.float16 if precision == "float16" else need("ml_dtypes")[0].bfloat16
        return Plan(value, uses, precision, False, array.astype(kind), None, None)
    first = uses[0]
    alike = all(use.role == "matrix" and use.steps == first.steps for use in uses)
    operand = viewed(array, first.steps)
    if alike and operand.ndim == 2:
        found = rounded(operand, BITS[precision])
        return Plan(value, uses, precision, True, found.codes, found.scales, found)
    stored = precision if first.role == "experts" else "int8"
    found = rounded(array.reshape(-1, array.shape[-1]).T, BITS[stored])
    codes, scales = found.codes.T.reshape(array.shape), found.scales.T
    return Plan(value, uses, stored, False, codes, scales.reshape(*array.shape[:-1], -1), found)


def put_values(plans: Sequence[Plan]) -> None:
    """Let the graph hold, in float32, what the codes stand for."""
    (ir,) = need("onnx_ir")
    for plan in plans:
        held = np.ascontiguousarray(plan.values)
        plan.value.const_value = ir.tensor(held, name=plan.value.name)


class Own:
    """The weights that a graph of routed modules holds, and which of them are routers'.

    The exporter keeps the names of large ones, and folds small ones into others: these are told by
    their numbers, in any order.
    """

    def __init__(self, graph: nn.Module) -> None:
        routers = [f"{path}." for path, m in graph.named_modules() if isinstance(m, Budgeted)]
        held = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
        self._held: dict[str, torch.Tensor] = held
        self._router = {name: name.startswith(tuple(routers)) for name in held}
        self._folded: dict[int, dict[bytes, bool]] = {}  # by count of numbers, as they are asked

    def whose(self, value: Any) -> str | None:
        """None for a weight that may be rounded, else what it is."""
        if one_product.PARTS in value.meta:
            found = [self.whose(part) for part in value.meta[one_product.PARTS]]
            return next((why for why in found if why is not None), None)
        router = self._router.get(value.name)
        if router is None:  # a unit's slice of packed weights (branches.py)
            router = self._router.get(value.name.rpartition("_")[0])
        if router is None:
            router = self._like(value.const_value.size).get(_numbers(value.const_value.numpy()))
        if router is None:
            return "made by the exporter"
        return "of routers" if router else None

    def _like(self, size: int) -> dict[bytes, bool]:
        """Sorted numbers -> whether a router's, of all weights with ``size`` numbers."""
        if size not in self._folded:
            found = self._folded.setdefault(size, {})
            for name, tensor in self._held.items():
                if tensor.numel() == size and tensor.dtype == torch.float32:
                    numbers = _numbers(tensor.detach().cpu().numpy())
                    found[numbers] = found.get(numbers, False) or self._router[name]
        return self._folded[size]


def _numbers(array: Any) -> bytes:
    flat: bytes = np.sort(array, axis=None).tobytes()
    return flat
