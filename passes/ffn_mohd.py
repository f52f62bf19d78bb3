"""ffn-mohd: route hidden sub-dimensions: each token's feed-forward layer reads a few of them.

Mixture of Hidden-Dimensions (Chen et al., arXiv:2412.05644) as a rewrite of a dense layer. The D
input features are sorted by what they add to the output and cut into N sub-dimensions; the first
ones are shared, of the others a token uses those that a router picks. Up and gate projections do
not read dead sub-dimensions; with ``sides=both`` the down projection does not write them either
(the paper's form: its layers are narrow at both ends). ``scaling`` is the exponent of the paper's
activation scaling total / active, trained from there; ``fusion`` adds its group fusion layer, a
block-diagonal matrix over permuted features, the identity at first.

Unlike the paper, nothing is trained: a router is a ridge regression of log energy on magnitudes,
one threshold per layer, and dead sub-dimensions keep their mean. With all live nothing is scaled or
replaced: REORDERED. Without calibration data the router sums ``|x_j|`` times column norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import Pass, Rewrite, Splice, option
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 8192  # calibration tokens kept per layer


@dataclasses.dataclass(frozen=True)
class FfnMohd(Pass[FeedForward]):
    """Feed-forward layer -> the same layer on sub-dimensions that each token picks."""

    subdims: int = option(0, "sub-dimensions, shared ones included; 0 = up to 64", ge=0)
    active: float = option(1.0, "fraction of sub-dimensions that a token uses", gt=0, le=1)
    shared: int = option(-1, "sub-dimensions that every token uses; -1 = a quarter", ge=-1)
    sides: str = option(
        "input", "both = dead sub-dimensions are not written either", among=("input", "both")
    )
    router: str = option(
        "auto",
        "auto = threshold if calibrated, else top-k; static = the same for every token",
        among=("auto", "threshold", "top-k", "static"),
    )
    scaling: float = option(0.0, "activation scaling: power of total / active", ge=0, le=1)
    fusion: bool = option(True, "add the group fusion layer (identity until trained)")
    compensate: bool = option(True, "dead sub-dimensions keep their mean")

    def _sizes(self, width: int) -> tuple[int, int]:
        """(sub-dimensions, shared ones)."""
        from sparsify.passes._hidden import sizes

        return sizes(width, self.subdims, self.shared)

    def check(self, ffn: FeedForward) -> None:
        from sparsify.passes._hidden import check_subdims

        calibrated = "x" in ffn.samples
        check_subdims(ffn.width, *self._sizes(ffn.width), self.router, calibrated=calibrated)

    def taps(self, region: FeedForward) -> Mapping[str, int]:
        return {"x": TOKENS, "stream.energy": TOKENS}

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        import torch

        from sparsify.passes import _hidden
        from sparsify.runtime.heads import RoutedRows
        from sparsify.runtime.hidden import HiddenFFN, unmixed
        from sparsify.weights import packed_hidden

        units, shared = self._sizes(ffn.width)
        x = ffn.samples.get("x")
        means = x if self.compensate else None
        effect = _hidden.ffn_effect(ffn, x)
        order = _hidden.feature_order(effect, x)
        weight = ffn.down.weight
        router = _hidden.hidden_router(
            effect,
            x,
            order,
            units,
            shared,
            rule=self.router,
            power=self.scaling,
            scale=ffn.samples.get("stream.energy"),
            dtype=weight.dtype,
        )
        still = None
        if self.sides == "both":
            still = torch.zeros(ffn.width) if means is None else _hidden.mean_output(ffn, means)
            still = still[order].view(units, -1).to(weight.dtype)
        module = HiddenFFN(
            router,
            _hidden.packed_columns(ffn.up, order, units, means),
            None if ffn.gate is None else _hidden.packed_columns(ffn.gate, order, units, means),
            RoutedRows.from_dense(weight, ffn.down.bias, order.view(units, -1)),
            activation=ffn.activation,
            both=self.sides == "both",
            still=still,
            mixing=unmixed(units, ffn.width // units, weight.detach()) if self.fusion else None,
        )
        fitted = "calibrated" if x is not None else "from weights"
        note = (
            f"{units} sub-dimensions of {ffn.width // units} features, {shared} shared, "
            f"{router.rule} router ({fitted})"
        )
        length = ffn.length + (units if self.fusion else 0)
        return Rewrite(
            (Splice("mohd", module, ("x",), "ffn"),), packed_hidden(ffn), note, length=length
        )

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.hidden import HiddenFFN

        assert isinstance(module, HiddenFFN)
        router = module.router
        router.settle(router.scores(inputs[0].reshape(-1, module.width)), alone=alone)
        return None
