"""attn-moa: give attention heads spans; keys beyond a head's span are neither scored nor summed.

Mixture of Attention (MoA, Fu et al., arXiv:2406.14909): the span of a head for N keys follows an
elastic rule ``alpha + beta * N`` with a beta per head and layer, and the first keys stay visible
(sinks). Here beta is a multiple of 1/steps, one unit of the dial each. On calibration data the
mass of every head's whole attention within each span is measured, once per layer, and units go
where they keep most of it, over heads and layers; without data all heads grow alike. (The paper
estimates influence on the loss by gradients; the mass within the span stands for it here.)

At initialization every span covers all keys; scores are computed head by head: REORDERED.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.regions import Attention

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class AttnMoa(Pass[Attention]):
    """Attention -> attention within a span per head."""

    moves_weights: ClassVar[bool] = False

    active: float = option(1.0, "fraction of the keys that a head sees, on average", gt=0, le=1)
    alpha: int = option(4, "keys that every head sees at least, its own included", ge=1)
    sinks: int = option(4, "first keys that every head sees", ge=0)
    steps: int = option(16, "spans grow in steps of this part of the keys", ge=2, le=256)

    def check(self, attention: Attention) -> None:
        from sparsify.passes._spans import check_softmax

        if attention.cross:
            raise Refused("queries and keys are of different sequences: there is no distance")
        check_softmax(attention)

    def taps(self, region: Attention) -> Mapping[str, int]:
        return {"x": 1}  # spans are fitted where the calibration data run again: see settle

    def rewrite(self, attention: Attention) -> Rewrite:
        from sparsify.runtime.prefix import Prefix
        from sparsify.runtime.spans import SpanAttend

        module = SpanAttend(
            attention.score,
            **attention.sizes,
            alpha=self.alpha,
            sinks=self.sinks,
            steps=self.steps,
            budget=Prefix(attention.heads * self.steps),
        )
        note = f"{attention.heads} heads, spans {self.alpha} + n/{self.steps} N, {self.sinks} sinks"
        operands = ("q", "k", "v", *attention.score_operands)
        return Rewrite((Splice("attend", module, operands, "attend"),), (), note)

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.passes._spans import fit
        from sparsify.runtime.spans import SpanAttend

        assert isinstance(module, SpanAttend)
        if alone and module.budget.errors is None:  # once: the first settled run
            fit(module, *inputs)
        return None
