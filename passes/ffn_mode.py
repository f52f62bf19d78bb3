"""ffn-mode: split each feed-forward layer into experts that the noise level chooses once per step.

Mixture of Denoising Experts (MoDE, Reuss et al., arXiv:2412.12953): in a diffusion transformer the
router sees the conditioning vector of the block (the noise level, and the class where the model
adds it), not the tokens. So the experts are the same for all tokens of a sample and for all calls
at one noise level: outside of training they are chosen once per condition, their weights fused into
one dense layer and kept, and the step runs at dense speed on the live neurons alone.

As in ffn-moe, experts are blocks of the dense layer's neurons and weights are exactly one. Where
nothing modulates a block per sample the layer is refused. The router starts random, as in the
paper, and learns when the model is trained: calibration texts hold no noise levels.

At initialization, all experts live, every neuron is summed once: REORDERED.
"""

from __future__ import annotations

import dataclasses

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.regions import FeedForward

MOST = 16  # experts by default


@dataclasses.dataclass(frozen=True)
class FfnMode(Pass[FeedForward]):
    """Feed-forward layer -> experts chosen by the conditioning vector."""

    experts: int = option(0, "experts per layer, shared ones included; 0 = up to 16", ge=0)
    active: float = option(1.0, "fraction of experts that a sample uses", gt=0, le=1)
    shared: int = option(0, "experts that every sample uses", ge=0)
    split: str = option(
        "importance", "how neurons are grouped", among=("cluster", "importance", "contiguous")
    )
    cache: int = option(
        16, "sets of experts kept fused per layer: one per step of the sampler; 0 = none", ge=0
    )
    noise: float = option(0.02, "standard deviation of the router's initial weights", ge=0)
    seed: int = option(0, "of the router's initial weights and of the clustering", ge=0)

    def _experts(self, ffn: FeedForward) -> int:
        from sparsify.passes._experts import default_experts

        return self.experts or default_experts(ffn.hidden, MOST)

    def check(self, ffn: FeedForward) -> None:
        from sparsify.passes._experts import check_experts

        if "condition" not in ffn.ports:
            raise Refused(
                "no value per sample modulates its input: there is no noise level to route by",
                suggestion="ffn-moe routes by the tokens",
            )
        experts = self._experts(ffn)
        check_experts(ffn.hidden, experts, self.shared)

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        import torch

        from sparsify.passes._experts import group
        from sparsify.runtime.conditioned import ConditionedFFN
        from sparsify.runtime.router import Router
        from sparsify.weights import packed_ffn

        experts = self._experts(ffn)
        order = group(ffn, None, experts, self.shared, self.split, self.seed)
        generator = torch.Generator().manual_seed(self.seed + ffn.index)
        width = ffn.condition_width
        weight = torch.randn(experts - self.shared, width, generator=generator) * self.noise
        router = Router(weight.to(ffn.up.weight), shared=self.shared, rule="top-k")
        module = ConditionedFFN.from_dense(
            *ffn.tensors,
            order=order,
            experts=experts,
            activation=ffn.activation,
            router=router,
        )
        module.sets = self.cache
        note = (
            f"{experts} experts of {ffn.hidden // experts} neurons, {self.shared} shared, chosen by"
            f" a condition of {width} features (random router), {self.cache} sets kept fused"
        )
        splice = Splice("mode", module, ("x", "condition"), "ffn")
        return Rewrite((splice,), packed_ffn(ffn, "mode"), note)
