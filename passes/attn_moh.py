"""attn-moh: turn attention heads into experts and route every token to a few of them.

Mixture of Heads (Jin et al., arXiv:2410.11842): heads are units, ``y = sum over live heads of
head_h(x) W_o^h + b_o``; some are shared (always live). Keys and values stay complete, so later
tokens can attend to every position; the query projection, the scores, the weighted sum and the
columns of the output projection are computed for live (token, head) pairs only. With grouped
queries, a token whose whole key/value group is dead costs nothing there. Unlike the paper, weights
are exactly one at conversion (its two-stage softmax weights change the dense model's output; with
``router=moh weights=scaled`` they come in by training), and what a dead head gives on average is
added back.

At initialization, all heads live, the output projection is summed head by head: REORDERED.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.passes._rules import COUNTING, CUTTING, HELP, check_rule, chosen_rule
from sparsify.regions import Attention

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.router import Router

TOKENS = 8192  # calibration tokens kept per layer


@dataclasses.dataclass(frozen=True)
class AttnMoh(Pass[Attention]):
    """Attention -> mixture of its own heads."""

    active: float = option(1.0, "fraction of heads that a token uses", gt=0, le=1)
    shared: int = option(-1, "heads that every token uses; -1 = a quarter of them", ge=-1)
    router: str = option("auto", HELP, among=("auto", *COUNTING, "moh", *CUTTING))
    groups: int = option(
        1, "head groups: group-top-k keeps as many of each, sigmoid-top-k some", ge=1
    )
    groups_kept: int = option(1, "groups that sigmoid-top-k chooses from, at least", ge=1)
    weights: str = option(
        "one",
        "of live heads: one, or the rule's own, scaled and blended in by training",
        among=("one", "scaled"),
    )
    compensate: bool = option(True, "add back the mean output of the heads a token drops")

    def _shared(self, attention: Attention) -> int:
        return attention.heads // 4 if self.shared < 0 else self.shared

    def check(self, attention: Attention) -> None:
        if attention.heads < 2:
            raise Refused("a single head cannot be routed")
        if self._shared(attention) >= attention.heads:
            raise Refused(
                f"{self._shared(attention)} shared of {attention.heads} heads leave none to route",
                suggestion=f"shared={attention.heads // 4}",
            )
        routed = attention.heads - self._shared(attention)
        check_rule(self.router, vars(self), routed, calibrated="x" in attention.samples)

    def taps(self, region: Attention) -> Mapping[str, int]:
        wanted = {"x": TOKENS, "context": TOKENS}
        comparable = "stream" in region.ports and not region.time_major  # rows in one order
        return wanted | ({"stream.energy": TOKENS} if comparable else {})

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.router import Router

        if isinstance(module, Router):
            module.settle(module.scores(inputs[0]), alone=alone)
        return None

    def rewrite(self, attention: Attention) -> Rewrite:
        from sparsify.runtime.attend import RoutedAttend
        from sparsify.runtime.heads import RoutedColumns, RoutedRows
        from sparsify.weights import packed_attention

        router, dropped = self._router(attention)
        attend = RoutedAttend(
            attention.score,
            **attention.sizes,
            time_major=attention.time_major,
        )
        output = RoutedColumns.from_dense(
            attention.output.weight, attention.output.bias, attention.output_columns, dropped
        )
        splices = [Splice("router", router, ("x",))]
        if attention.query_rows is not None:
            query = RoutedRows.from_dense(
                attention.projection.weight, attention.projection.bias, attention.query_rows
            )
            splices.append(Splice("query", query, ("x", "router"), "query"))
        operands = ("q", "k", "v", "router", *attention.score_operands)
        splices.append(Splice("attend", attend, operands, "attend"))
        splices.append(Splice("output", output, ("context", "router"), "output"))
        fitted = "calibrated" if attention.samples else "from weights"
        shared = self._shared(attention)
        note = f"{attention.heads} heads"
        if attention.kv_heads != attention.heads:
            note += f" in {attention.kv_heads} groups"
        note += f", {shared} shared, {router.rule} router ({fitted})"
        if attention.query_rows is None:
            note += "; query projection stays dense (its rows cannot be told apart by head)"
        return Rewrite(tuple(splices), packed_attention(attention), note)

    def _router(self, attention: Attention) -> tuple[Router, Tensor | None]:
        """The router, shared heads first, and the mean output of each head where calibrated."""
        import torch

        from sparsify.passes._heads import head_energy, head_means, head_scores
        from sparsify.passes._ridge import fit_router, relative_losses
        from sparsify.runtime.router import Router

        shared = self._shared(attention)
        energy = head_energy(attention)
        order = energy.mean(0).argsort(descending=True, stable=True)
        order = torch.cat([order[:shared].sort().values, order[shared:].sort().values])
        dtype = attention.query.weight.dtype
        routed = order[shared:]
        if not attention.samples:
            weight = head_scores(attention)[routed].to(dtype)
            rule = chosen_rule(self.router, vars(self), calibrated=False)
            return Router(weight, shared=shared, rule=rule, order=order), None
        x = attention.samples["x"]
        weight, bias = fit_router(x, energy[:, routed])
        rule = chosen_rule(self.router, vars(self), calibrated=True)
        router = Router(weight.to(dtype), bias.to(dtype), shared=shared, rule=rule, order=order)
        router.calibrate(x, relative_losses(energy[:, routed], attention.samples))
        dropped = head_means(attention).to(dtype) if self.compensate else None
        return router, dropped
