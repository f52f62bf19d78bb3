"""ffn-moe: split each feed-forward layer into experts and route every token to a few of them.

The F neurons are permuted into N blocks of equal size; block e with its rows of the up (and gate)
projection and its columns of the down projection is expert e, and ``y = sum of live experts +
bias``. Some experts are shared (always live). As in LLaMA-MoE (arXiv:2406.16554) and CMoE
(arXiv:2502.04416), nothing is trained; unlike them, gate weights are exactly one, a router is a
ridge regression on the log of what an expert contributes, one threshold per layer lets tokens take
as many experts as they need, budgets go to the layers where they save most, and what is dropped is
estimated from the router's scores (least squares) and added back.

At initialization, all experts live, every neuron is summed once: REORDERED. Without calibration
data the router scores experts by their mean gate direction, and each token takes the same number of
them. Every rule of ``router=`` starts so, all live with weight one; a rule's own weights
(``weights=scaled``) come in by training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import Pass, Rewrite, Splice, option
from sparsify.passes._rules import COUNTING, CUTTING, HELP, check_rule, chosen_rule
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.ffn import RoutedFFN
    from sparsify.runtime.router import Router

MOST = 64  # experts by default: finer blocks lose less, coarser ones run faster
TOKENS = 8192  # calibration tokens kept per layer


@dataclasses.dataclass(frozen=True)
class FfnMoe(Pass[FeedForward]):
    """Feed-forward layer -> mixture of experts made of its own neurons."""

    experts: int = option(0, "experts per layer, shared ones included; 0 = up to 64", ge=0)
    active: float = option(1.0, "fraction of experts that a token uses", gt=0, le=1)
    shared: int = option(-1, "experts that every token uses; -1 = a quarter of them", ge=-1)
    split: str = option(
        "cluster", "how neurons are grouped", among=("cluster", "importance", "contiguous")
    )
    router: str = option("auto", HELP, among=("auto", *COUNTING, *CUTTING, "expert-choice"))
    groups: int = option(
        1, "expert groups: group-top-k keeps as many of each, sigmoid-top-k some", ge=1
    )
    groups_kept: int = option(1, "groups that sigmoid-top-k chooses from, at least", ge=1)
    prune: float = option(
        0.0, "top-k drops experts that weigh less than this times the first (MC-MoE)", ge=0, lt=1
    )
    protect: float = option(
        0.02, "share of the calibration tokens that prune leaves alone", ge=0, lt=1
    )
    weights: str = option(
        "one",
        "of live experts: one, or the rule's own, scaled and blended in by training",
        among=("one", "scaled"),
    )
    compensate: bool = option(True, "add back an estimate of what a token's dropped experts give")
    seed: int = option(0, "of the clustering", ge=0)

    def _experts(self, ffn: FeedForward) -> int:
        from sparsify.passes._experts import default_experts

        return self.experts or default_experts(ffn.hidden, MOST)

    def _shared(self, experts: int) -> int:
        return experts // 4 if self.shared < 0 else self.shared

    def _layer(self) -> type[RoutedFFN]:
        from sparsify.runtime.ffn import RoutedFFN

        return RoutedFFN

    def check(self, ffn: FeedForward) -> None:
        from sparsify.passes._experts import check_experts

        experts = self._experts(ffn)
        check_experts(ffn.hidden, experts, self._shared(experts))
        routed = experts - self._shared(experts)
        check_rule(self.router, vars(self), routed, calibrated="x" in ffn.samples)

    def taps(self, region: FeedForward) -> Mapping[str, int]:
        return {"x": TOKENS, "stream.energy": TOKENS}

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        from sparsify.passes._experts import group, hidden_of, mean_outputs
        from sparsify.weights import packed_ffn

        experts = self._experts(ffn)
        shared = self._shared(experts)
        x = ffn.samples.get("x")
        hidden = hidden_of(ffn, x) if x is not None else None
        order = group(ffn, hidden, experts, shared, self.split, self.seed)
        if x is not None and hidden is not None:
            router = self._fitted(ffn, x, hidden, order, experts, shared)
            dropped = None
            if self.compensate:
                dropped = mean_outputs(ffn, hidden, order, experts).to(ffn.up.weight.dtype)
        else:
            router, dropped = self._from_weights(ffn, order, experts, shared), None
        module = self._layer().from_dense(
            *ffn.tensors,
            order=order,
            experts=experts,
            activation=ffn.activation,
            router=router,
            dropped=dropped,
        )
        fitted = "calibrated" if x is not None else "from weights"
        note = (
            f"{experts} experts of {ffn.hidden // experts} neurons, {shared} shared, "
            f"{router.rule} router ({fitted})"
        )
        return Rewrite((Splice("moe", module, ("x",), "ffn"),), packed_ffn(ffn, "moe"), note)

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.passes._ridge import fit_stand_ins
        from sparsify.runtime.ffn import RoutedFFN

        assert isinstance(module, RoutedFFN)
        x = inputs[0].reshape(-1, module.width)
        scores = module.router.scores(x)
        module.router.settle(scores, alone=alone)
        if not (self.compensate and alone):
            return None
        constants, slopes, y = fit_stand_ins(module, x, scores)
        module.add_stand_ins(module.router.active, constants, slopes)
        return y.view_as(inputs[0])

    def _fitted(
        self,
        ffn: FeedForward,
        x: Tensor,
        hidden: Tensor,
        order: Tensor,
        experts: int,
        shared: int,
    ) -> Router:
        """The router, fitted to calibration samples."""
        from sparsify.passes._experts import expert_energy
        from sparsify.passes._ridge import fit_router, relative_losses
        from sparsify.passes._rules import protected
        from sparsify.runtime.router import Router

        energy = expert_energy(ffn, hidden, order, experts)[:, shared:]
        weight, bias = fit_router(x, energy)
        dtype = ffn.up.weight.dtype
        rule = chosen_rule(self.router, vars(self), calibrated=True)
        router = Router(weight.to(dtype), bias.to(dtype), shared=shared, rule=rule)
        router.calibrate(x, relative_losses(energy, ffn.samples))
        protected(router, x, self.protect)
        return router

    def _from_weights(self, ffn: FeedForward, order: Tensor, experts: int, shared: int) -> Router:
        """Scores by an expert's mean gate (or up) row, neurons weighted by their column norm."""
        from sparsify.runtime.router import Router

        part = ffn.gate if ffn.gate is not None else ffn.up
        norm = ffn.down.weight.norm(dim=0)[order]
        norm = norm / norm.mean().clamp_min(1e-12)
        rows = (part.weight[order] * norm[:, None]).view(experts, -1, ffn.width).mean(1)
        bias = None
        if part.bias is not None:
            bias = (part.bias[order] * norm).view(experts, -1).mean(1)[shared:]
        rule = chosen_rule(self.router, vars(self), calibrated=False)
        return Router(rows[shared:].clone(), bias, shared=shared, rule=rule)
