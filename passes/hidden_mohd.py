"""hidden-mohd: route hidden sub-dimensions: each token's projections read a few blocks of inputs.

The hidden half of Mixture of Hidden-Dimensions (Chen et al., arXiv:2412.05644) for any projection
(q, k, v, output, gate, up, down): its input features are sorted by what they add, cut into N
sub-dimensions, and a router picks per token which of them are read, beside the shared ones.
Projections that read the same input share one router, so q, k and v have one selection, as in the
paper's routed hidden state. ``scaling`` is the exponent of its activation scaling; ``fusion`` mixes
the outputs of projections that write to the residual stream (the identity until trained).
Sub-dimensions are blocks picked by a learned router, not single columns under a threshold (TEAL).

Nothing is trained: routers are ridge regressions of log energy on magnitudes, and dead
sub-dimensions keep their mean. With all live: REORDERED. Without calibration data the router sums
``|x_j|`` times column norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsify.core import Pass, Rewrite, Splice, option
from sparsify.regions import Projection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.hidden import HiddenRouter

TOKENS = 2048  # calibration tokens kept per projection (there are seven and more in a block)
WRITES = ("output", "down")  # roles whose result is added to the residual stream


@dataclasses.dataclass(frozen=True)
class HiddenMohd(Pass[Projection]):
    """Projection -> the same projection on input sub-dimensions that each token picks."""

    subdims: int = option(0, "sub-dimensions of the input, shared included; 0 = up to 64", ge=0)
    active: float = option(1.0, "fraction of sub-dimensions that a token uses", gt=0, le=1)
    shared: int = option(-1, "sub-dimensions that every token uses; -1 = a quarter", ge=-1)
    router: str = option(
        "auto",
        "auto = threshold if calibrated, else top-k; static = the same for every token",
        among=("auto", "threshold", "top-k", "static"),
    )
    scaling: float = option(0.0, "activation scaling: power of total / active", ge=0, le=1)
    fusion: bool = option(True, "add the group fusion layer where the residual stream is written")
    compensate: bool = option(True, "dead sub-dimensions keep their mean")

    def _sizes(self, width: int) -> tuple[int, int]:
        """(sub-dimensions, shared ones)."""
        from sparsify.passes._hidden import sizes

        return sizes(width, self.subdims, self.shared)

    def check(self, projection: Projection) -> None:
        from sparsify.passes._hidden import check_subdims

        width = int(projection.linear.weight.shape[1])
        calibrated = "x" in projection.samples
        check_subdims(width, *self._sizes(width), self.router, calibrated=calibrated)

    def taps(self, region: Projection) -> Mapping[str, int]:
        return {"x": TOKENS}

    def rewrite(self, projection: Projection) -> Rewrite:
        from sparsify.passes import _hidden
        from sparsify.runtime.hidden import HiddenColumns, unmixed
        from sparsify.weights import packed_projection

        linear = projection.linear
        out, width = (int(n) for n in linear.weight.shape)
        units, shared = self._sizes(width)
        x = projection.samples.get("x")
        effect = _hidden.stacked(projection.beside or (linear,), x)
        order = _hidden.feature_order(effect, x)
        means = x if self.compensate else None
        unit_columns, dropped = _hidden.columns_of(linear, order, units, means)
        packed = HiddenColumns.from_dense(linear.weight, linear.bias, unit_columns, dropped)
        groups = _hidden.default_subdims(out)
        if self.fusion and groups > 1 and projection.role in WRITES:
            packed.mix(unmixed(groups, out // groups, linear.weight.detach()))
        router, port = self._sharing(projection, units, shared), f"{self.name}.router"
        splices = []
        if router is None:
            port = "router"
            router = _hidden.hidden_router(
                effect,
                x,
                order,
                units,
                shared,
                rule=self.router,
                power=self.scaling,
                scale=None if x is None else x.new_ones(len(x), 1),
                dtype=linear.weight.dtype,
            )
            router.unit_cost = float(width // units * len(effect))
            splices.append(Splice("router", router, ("x",)))
        splices.append(Splice("mohd", packed, ("x", port), "projection"))
        fitted = "calibrated" if x is not None else "from weights"
        note = (
            f"{units} sub-dimensions of {width // units} features, {shared} shared, "
            f"{router.rule} router ({fitted}"
        )
        note += ")" if port == "router" else "; the one of another projection of this input)"
        how = "columns by sub-dimension, transposed"
        length = projection.length + (groups if packed.mixing is not None else 0)
        return Rewrite(
            tuple(splices),
            packed_projection(projection, "mohd", "blocks", how),
            note,
            length=length,
        )

    def _sharing(self, projection: Projection, units: int, shared: int) -> HiddenRouter | None:
        """The router of another projection that reads the same input, if it fits this one."""
        node = projection.ports.get(f"{self.name}.router")
        if node is None:
            return None
        graph: Any = node.graph.owning_module
        router: HiddenRouter = graph.get_submodule(str(node.target))
        return router if (router.units, router.shared) == (units, shared) else None

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.hidden import HiddenRouter

        if isinstance(module, HiddenRouter):
            module.settle(module.scores(inputs[0]), alone=alone)
        return None
