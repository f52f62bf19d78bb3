"""ffn-upcycle: copy each feed-forward layer into experts that further training can tell apart.

Sparse upcycling (Komatsuzaki et al., arXiv:2212.05055): every expert starts as the whole dense
layer, a softmax top-k router weights the experts a token uses, and the weights are renormalised to
sum to one. So whatever the router picks, the sum is the dense layer's output: REORDERED at any
budget, before training. Parameters grow with ``experts``; the work per token grows with ``k``.
"""

from __future__ import annotations

import dataclasses

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.regions import FeedForward


@dataclasses.dataclass(frozen=True)
class FfnUpcycle(Pass[FeedForward]):
    """Feed-forward layer -> mixture of identical experts, to be trained."""

    experts: int = option(4, "copies of the layer", ge=2, le=256)
    k: int = option(2, "experts that a token uses", ge=1)
    noise: float = option(0.02, "standard deviation of the router's initial weights", ge=0)
    seed: int = option(0, "of the router's initial weights", ge=0)

    def check(self, ffn: FeedForward) -> None:
        if self.k > self.experts:
            raise Refused(
                f"k={self.k} is more than the {self.experts} experts",
                suggestion=f"k={self.experts} or fewer",
            )

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        import torch

        from sparsify.runtime.ffn import RoutedFFN
        from sparsify.runtime.router import Router
        from sparsify.weights import packed_ffn

        generator = torch.Generator().manual_seed(self.seed + ffn.index)
        weight = torch.randn(self.experts, ffn.width, generator=generator) * self.noise
        router = Router(
            weight.to(ffn.up.weight), rule="softmax-top-k", active=self.k / self.experts
        )
        module = RoutedFFN.from_dense(
            *ffn.tensors,
            experts=self.experts,
            activation=ffn.activation,
            router=router,
            copies=True,
        )
        note = f"{self.experts} copies, {self.k} used by each token (softmax weights, sum 1)"
        return Rewrite(
            (Splice("upcycle", module, ("x",), "ffn"),), packed_ffn(ffn, "upcycle"), note
        )
