"""What a target counts: operations, bytes, or decoding time, of the whole model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sparsify.costs import routed_cost
from sparsify.report import Report
from sparsify.runtime.cost import Cost
from sparsify.runtime.dial import set_active
from sparsify.runtime.model import SparseModel
from sparsify.searching_goal import Target

Curve = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Meter:
    """Turns the cost of all routed modules into the one number that a budget limits.

    That is operations for ``flops``, and bytes for ``bytes`` and ``speed``: a speed is what a
    measured curve gives at so many bytes (:mod:`sparsify.searching_speed`).

    Attributes:
        kind: of the target.
        dense: what the dense model costs; live: the routed one with everything live; fixed: what
            no router changes.
        curve: (bytes, speedup over dense), the dearest first; of ``speed`` only.
    """

    kind: str
    dense: float
    live: float
    fixed: float
    curve: Curve = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, sparse: SparseModel, kind: str, *, context: int) -> Meter:
        """Of a compiled model whose dials stand where its report counted them.

        They are turned to all live.
        """
        report = sparse.report
        assert isinstance(report, Report)
        nodes = [n for n in sparse.graph.graph.nodes if n.op == "call_module"]
        as_made = cls._part(kind, routed_cost(sparse.graph, nodes, context=context))
        set_active(sparse.graph, 1.0)
        live = cls._part(kind, routed_cost(sparse.graph, nodes, context=context))
        flops = kind == "flops"
        dense = report.dense.flops_per_token if flops else report.dense.bytes_per_token
        made = report.sparse.flops_per_token if flops else report.sparse.bytes_per_token
        fixed = made - as_made
        return cls(kind, dense, fixed + live, fixed)

    @staticmethod
    def _part(kind: str, cost: Cost) -> float:
        return cost.flops if kind == "flops" else cost.bytes + cost.cache

    def part(self, cost: Cost) -> float:
        """What routed modules of this cost count for."""
        return self._part(self.kind, cost)

    def cost(self, cost: Cost) -> float:
        """What the whole model costs where its routed modules cost this."""
        return self.fixed + self.part(cost)

    def said(self, cost: float) -> float:
        """A cost as a target says it: a share of the dense model's, or a speed."""
        if self.kind != "speed":
            return cost / self.dense
        return 1 / _between([(b, 1 / s) for b, s in self.curve], cost)

    def budget(self, target: Target) -> float:
        """The cost that meets a target; minus infinity where no point of the curve does."""
        if self.kind != "speed":
            return target.value * self.dense
        seconds = sorted((1 / speed, size) for size, speed in self.curve)
        wanted = 1 / target.value
        return -math.inf if wanted < seconds[0][0] else _between(seconds, wanted)


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between (x, y) points, the last ones' values beyond them."""
    xs, ys = zip(*sorted(points), strict=True)
    return float(np.interp(at, xs, ys))
