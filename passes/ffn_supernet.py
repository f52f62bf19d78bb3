"""ffn-supernet: make each feed-forward layer one of many widths, its weights mixed for each width.

Mixture-of-Supernets (Jawahar et al., arXiv:2306.04845): a supernet whose sub-networks share expert
weights through a router instead of one set of weights. The layer is copied into a few experts, a
two-layer router maps the architecture to weights ``g`` with sum one, and the layer that runs is cut
out of ``sum of g_e W_e``: for all its weights (the paper's layer-wise form) or neuron by neuron
(neuron-wise; its unit here is a hidden neuron with its up, gate and down weights).

As in the paper the router sees the architecture, not the data: here the layer's own live width,
which the dial sets. So tokens do not mix, nothing is added per token, and the mixed weights are
made once per width and kept; the layer then costs what a dense one of that width costs. Neurons are
sorted by the energy they add to the output (by norms without calibration data); a width keeps the
first ones, which is static pruning until the experts have been trained apart. They start equal, so
the router's own gradient is zero at the very first step, and not after it.

At initialization, all neurons live, experts equal: every product is summed as before, over weights
that a sum of weights with total one gives back up to rounding: REORDERED.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.runtime.supernet import ArchitectureRouter

TOKENS = 8192  # calibration tokens kept per layer


@dataclasses.dataclass(frozen=True)
class FfnSupernet(Pass[FeedForward]):
    """Feed-forward layer -> one of any width, mixed from experts."""

    experts: int = option(2, "copies of the layer that are mixed", ge=2, le=64)
    active: float = option(1.0, "fraction of neurons that are live", gt=0, le=1)
    mix: str = option(
        "layer", "one mix for the layer, or one for every neuron", among=("layer", "neuron")
    )
    features: int = option(128, "hidden features of the router", ge=1)
    cache: int = option(4, "widths whose mixed weights are kept per layer; 0 = none", ge=0)
    seed: int = option(0, "of the router's initial weights", ge=0)

    def check(self, ffn: FeedForward) -> None:
        if ffn.hidden < 2:
            raise Refused("one hidden neuron has one width only")

    def taps(self, region: FeedForward) -> Mapping[str, int]:
        return {"x": TOKENS, "stream.energy": TOKENS}

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        from sparsify.passes._experts import hidden_of, neuron_energy
        from sparsify.runtime.budget import error_table
        from sparsify.runtime.supernet import SupernetFFN
        from sparsify.weights import packed_ffn

        x, stream = ffn.samples.get("x"), ffn.samples.get("stream.energy")
        energy = neuron_energy(ffn, None if x is None else hidden_of(ffn, x)).detach()
        ranked = energy.sort(descending=True, stable=True)
        errors = None
        if x is not None and stream is not None:
            scale = 1 / float(stream.double().mean().clamp_min(1e-30))
            errors = error_table(ranked.values.flip(0), scale)
        module = SupernetFFN.from_dense(
            *ffn.tensors,
            order=ranked.indices,
            activation=ffn.activation,
            router=self._router(ffn, errors),
            kept=self.cache,
        )
        note = (
            f"{self.experts} copies mixed per {self.mix} for the live width, neurons in order of"
            f" {'energy (calibrated)' if x is not None else 'norms'}"
        )
        splice = Splice("supernet", module, ("x",), "ffn")
        length = ffn.length + 2 * self.experts
        return Rewrite((splice,), packed_ffn(ffn, "supernet"), note, length=length)

    def _router(self, ffn: FeedForward, errors: Tensor | None) -> ArchitectureRouter:
        """Uniform in one over the root of a layer's inputs, as ``nn.Linear``'s."""
        import torch

        from sparsify.runtime.supernet import ArchitectureRouter

        generator = torch.Generator().manual_seed(self.seed + ffn.index)
        groups = 1 if self.mix == "layer" else ffn.hidden

        def draw(*shape: int, inputs: int) -> Tensor:
            bound = 1 / math.sqrt(inputs)
            made = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            return made.to(ffn.up.weight)

        return ArchitectureRouter(
            draw(self.features, inputs=1),
            draw(self.features, inputs=1),
            draw(self.experts, groups, self.features, inputs=self.features),
            draw(self.experts, groups, inputs=self.features),
            size=ffn.hidden,
            errors=errors,
            unit_cost=float(ffn.width * (2 + (ffn.gate is not None))),
        )
