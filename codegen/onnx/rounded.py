"""A file with rounded weights: that rounding is all it differs by, and what that costs.

1. The graph in float32 is held against the model.
2. The file is held against the same graph with the values put in that its codes stand for.
3. What the file gives is set beside what the model gives; this is told, not judged.

In 2, and first in 3, ONNX Runtime computes in float32. By itself it rounds what a product with
codes reads to 8 bits, which is faster, and what that costs is the last part of 3.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import fx

from sparsify.codegen.onnx import parity
from sparsify.codegen.onnx.case import Case
from sparsify.codegen.onnx.codes_in_graph import put_codes
from sparsify.codegen.onnx.targets import BITS
from sparsify.codegen.onnx.weights import Weights, planned, put_values
from sparsify.codegen.onnx.write import aside
from sparsify.runtime.model import SparseModel

SAME = "the file beside float32 with the same weights"
COSTS = "what rounding costs"
FAST = "with activations in 8 bits, ONNX Runtime's own choice"


@dataclasses.dataclass(frozen=True)
class Proof:
    """What is known before the codes are in the graph.

    Attributes:
        trials: the model's cases; cases: the float32 graph against the model.
        expected: outputs with the values of the codes; None where the graph was off already.
    """

    precision: str
    trials: parity.Trials
    cases: tuple[Case, ...]
    expected: list[parity.Outputs] | None

    def of(self, file: Path) -> tuple[Case, ...]:
        """All cases, with those of the written file."""
        if self.expected is None:
            return self.cases
        trials = self.trials
        exact = trials.outputs_of(file, float32=True)
        costs = trials.between(exact, trials.eager, COSTS, held=False)
        cases = (
            *self.cases,
            *trials.between(exact, self.expected, SAME),
            *trials.with_selections(costs, file, float32=True),
        )
        if self.precision not in BITS:
            return cases
        costs = trials.between(trials.outputs_of(file), trials.eager, FAST, held=False)
        return (*cases, *trials.with_selections(costs, file))


def rounded(
    model: SparseModel,
    made: Any,
    precision: str,
    graph: fx.GraphModule,
    place: Path,
    *,
    check: bool,
) -> tuple[Weights, Proof | None]:
    """Round the weights of an ``onnx_ir.Model``; the proof where ``check`` asks for it.

    Args:
        graph: the forms that ``made`` was traced from; place: files in float32 lie beside it
            meanwhile.

    Raises:
        OutputError: they cannot be written.
    """
    plans, weights = planned(made, precision, graph)
    proof = None
    if check:
        trials = parity.Trials(model, graph)
        with aside(made, place) as plain:
            cases = trials.compared(plain)
        proof = Proof(precision, trials, cases, None)
        if all(case.ok for case in cases):
            put_values(plans)
            with aside(made, place) as plain:
                proof = dataclasses.replace(proof, expected=trials.outputs_of(plain))
    put_codes(made, plans)
    return weights, proof
