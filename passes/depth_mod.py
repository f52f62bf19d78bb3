"""depth-mod: route tokens around blocks: a token that skips a block keeps its stream as it is.

Mixture of Depths (Raposo et al., arXiv:2404.02258): every block has a router that reads the stream
and a budget (its capacity); tokens above it go through the block, the others past it. The router is
fitted to predict how much the block changes a token (log of the squared change over the squared
stream); where calibration data were given, budgets go to the blocks that change the stream most.
Where causal or calibrated, a token is judged alone by a threshold, which is the same while decoding
(the paper trains a predictor for that); ``router=top-k`` is the paper's expert choice over the
tokens of each sequence. Without data the threshold is a standard normal's, and budgets hold roughly
only.

``kv=live`` is the paper's rule: in a block, only tokens that are in it attend and are attended to;
the cache slot of a token that skipped it holds zeros. A model that was not trained so does not bear
it: the first token, on which heads rest (attention sinks, Xiao et al., arXiv:2309.17453), hardly
changes, so it skips, and all later tokens lose it. On SmolLM2 at ``active=0.9`` perplexity is 7.3
times the dense one, and 1.9 times with nothing but the first token kept. ``kv=all`` (the default
where keys are cached) computes keys and values for every token from the stream that it has, as
early exits do (state propagation, Schuster et al., arXiv:2207.07061): a token that skips a block is
attended to in it, for the price of those two projections.

All tokens live, the block is computed as the model wrote it: EXACT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from sparsify.core import EXACT, Claim, Pass, Refused, Rewrite, Splice, option
from sparsify.regions import Layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.depth import DepthRouter


@dataclasses.dataclass(frozen=True)
class DepthMod(Pass[Layer]):
    """Block -> block that only some tokens run."""

    claim: ClassVar[Claim] = EXACT
    moves_weights: ClassVar[bool] = False

    active: float = option(1.0, "fraction of (token, block) pairs that are computed", gt=0, le=1)
    first: int = option(0, "blocks at the start that every token runs", ge=0)
    last: int = option(0, "blocks at the end that every token runs", ge=0)
    router: str = option(
        "auto",
        "threshold = each token judged alone; top-k = the best tokens of each sequence; "
        "auto = threshold if causal or calibrated, else top-k",
        among=("auto", "threshold", "top-k"),
    )
    kv: str = option(
        "auto",
        "all = keys and values of every token; live = of the tokens that run the block; auto = all"
        " where keys are cached",
        among=("auto", "all", "live"),
    )
    compensate: bool = option(True, "add the mean change of the easier half of tokens when skipped")

    def check(self, layer: Layer) -> None:
        from sparsify.passes._depth import attends_to_all, check_layer

        if layer.index < self.first or layer.index >= layer.count - self.last:
            raise Refused(f"every token runs the first {self.first} and last {self.last} blocks")
        check_layer(layer)
        attends_to_all(layer, self.kv)

    def taps(self, region: Layer) -> Mapping[str, int]:
        from sparsify.passes._depth import TOKENS

        return {"x": TOKENS, "y": TOKENS}

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.depth import DepthRouter

        if isinstance(module, DepthRouter):
            module.settle(module.scores(inputs[0]), alone=alone)
        return None

    def rewrite(self, layer: Layer) -> Rewrite:
        from sparsify.passes._depth import attends_to_all, routed_layer

        router, dropped = self._router(layer)
        source = layer if attends_to_all(layer, self.kv) else None
        splice, moved = routed_layer(
            layer, layer, "layer", "router", dropped=dropped, source=source
        )
        fitted = "calibrated" if layer.samples else "from weights"
        note = f"{router.rule} router ({fitted})"
        if splice.module.slots:
            note += ", cache slots of skipping tokens are empty"
        if source is not None:
            note += ", keys and values of every token"
        splices = (Splice("router", router, ("x",)), splice)
        return Rewrite(splices, (), note, moved=moved)

    def _router(self, layer: Layer) -> tuple[DepthRouter, Tensor | None]:
        """The block's router, and what skipping tokens get instead."""
        from sparsify.passes._depth import (
            easier_half,
            is_causal,
            normal_quantiles,
            plain_weight,
            rule_for,
            updates,
        )
        from sparsify.passes._ridge import fit_router
        from sparsify.runtime.depth import DepthRouter

        dtype = layer.gm.meta.get("dtype")
        rule = rule_for(self.router, is_causal(layer), bool(layer.samples))
        if not layer.samples:
            weight = plain_weight(layer.width, 1, layer.index).to(dtype)
            return DepthRouter(weight, rule=rule, quantiles=normal_quantiles()), None
        unit, energy, change = updates(layer.samples)
        weight, bias = fit_router(unit, energy)
        router = DepthRouter(weight.to(dtype), bias.to(dtype), rule=rule)
        x = layer.samples["x"].to(dtype)
        router.calibrate(x, energy)
        if not self.compensate:
            return router, None
        return router, change[easier_half(router, x)].mean(0).to(dtype)
