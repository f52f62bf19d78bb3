"""ffn-moex: split each feed-forward layer into experts, routed by how sparsely they activate.

MoE-X (Yang et al., arXiv:2503.07639) sends a token to the experts that it activates most sparsely.
The share of an expert's neurons that ReLU would leave positive is predicted from the mean and the
variance of the expert's weights, taken as Gaussian: no forward pass of the expert, and nothing to
fit first. The weights are those that the activation sees: the gate's, or up's where there is none.
Experts are made as in ffn-moe.

Where this differs from the paper, as far as its text could be read here (not its equations): the
paper trains ReLU experts from scratch, so that they learn to say much with few neurons, and weighs
live experts by a softmax of the scores. Here the activation stays what it is and "active" means a
positive pre-activation; live experts weigh one, unless ``weights=scaled``; means and variances are
the router's own after the conversion and train apart from the experts (``SparsityRouter.refit``
takes them from the experts again); biases count as further weights.

In a dense model that was not trained so, the sparsest experts need not be those that matter.
``prefer=active``, ours, turns the score round. Neither is meant to beat ffn-moe's fitted router.

At initialization, all experts live, every neuron is summed once: REORDERED.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparsify.core import option
from sparsify.passes import ffn_moe
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.runtime.router import Router


@dataclasses.dataclass(frozen=True)
class FfnMoex(ffn_moe.FfnMoe):
    """Feed-forward layer -> experts routed by their expected activation sparsity."""

    prefer: str = option(
        "sparse",
        "experts that score high: of few active neurons (the paper's) or of many",
        among=("sparse", "active"),
    )

    def _fitted(
        self,
        ffn: FeedForward,
        x: Tensor,
        hidden: Tensor,
        order: Tensor,
        experts: int,
        shared: int,
    ) -> Router:
        """The weights' router; the samples only say where to cut."""
        from sparsify.passes._experts import expert_energy
        from sparsify.passes._ridge import relative_losses

        router = self._router(ffn, order, experts, shared, calibrated=True)
        energy = expert_energy(ffn, hidden, order, experts)[:, shared:]
        router.calibrate(x, relative_losses(energy, ffn.samples))
        return router

    def _from_weights(self, ffn: FeedForward, order: Tensor, experts: int, shared: int) -> Router:
        return self._router(ffn, order, experts, shared, calibrated=False)

    def _router(
        self, ffn: FeedForward, order: Tensor, experts: int, shared: int, *, calibrated: bool
    ) -> Router:
        from sparsify.passes._rules import chosen_rule
        from sparsify.runtime.sparsity import SparsityRouter

        part = ffn.gate if ffn.gate is not None else ffn.up
        rows = part.weight[order].view(experts, -1, ffn.width)[shared:]
        bias = None if part.bias is None else part.bias[order].view(experts, -1)[shared:]
        rule = chosen_rule(self.router, vars(self), calibrated=calibrated)
        return SparsityRouter.from_experts(rows, bias, shared=shared, rule=rule, prefer=self.prefer)
