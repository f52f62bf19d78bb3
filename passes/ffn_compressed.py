"""ffn-compressed: let the experts that a token skips modulate, by a vector each, those it uses.

Compressed experts (He et al., arXiv:2503.00634): of the k experts that a trained mixture routes a
token to, the main ones are computed; every other is replaced by vectors, ones at first, that
multiply the main experts' inputs and neurons; the vectors of a token's replaced experts are
averaged by their routing weights, and trained with the model.

Ours, where the paper starts from a mixture and we from a dense layer: experts are made and routed
as in ffn-moe, all of them belong to every token, so all that ``active`` leaves out are replaced. A
vector multiplies the live experts' summed output (D numbers an expert), where the best one is a
linear least-squares problem; and differences from one are summed, not averaged, so that the layer
goes over into the dense one as ``active`` goes to one. With calibration data they are fitted, per
budget, to what ffn-moe's estimate of the dropped experts leaves over. Without, they are ones: a
dropped expert adds nothing before training. Expect little before training, too: on small random
ReLU layers the fit takes 1 to 3 % off the error that ffn-moe's estimate leaves on unseen tokens
(vectors on hidden neurons, as in the paper, less); alone it is no match for the means.

At initialization, all experts live, no vector is used and every neuron is summed once: REORDERED.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparsify.core import Rewrite
from sparsify.passes import ffn_moe
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.ffn import RoutedFFN


@dataclasses.dataclass(frozen=True)
class FfnCompressed(ffn_moe.FfnMoe):
    """Feed-forward layer -> main experts, and vectors in place of the others."""

    def _layer(self) -> type[RoutedFFN]:
        from sparsify.runtime.compressed import CompressedFFN

        return CompressedFFN

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        made = super().rewrite(ffn)
        experts = self._experts(ffn)
        routed = experts - self._shared(experts)
        return dataclasses.replace(made, note=f"{made.note}, {routed} of them compressible")

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.passes._ridge import fit_modulation
        from sparsify.runtime.compressed import CompressedFFN

        y = super().settle(module, inputs, alone)
        if not alone:
            return y
        assert isinstance(module, CompressedFFN)
        x = inputs[0].reshape(-1, module.width)
        dead, given, missing = module.without_vectors(x, module.router.scores(x))
        vectors = fit_modulation(dead, given, missing)
        module.add_vectors(module.router.active, vectors)
        if y is None:
            return None
        change = given * (dead.to(given) @ vectors.to(given))
        return y + change.view_as(y).to(y.dtype)
