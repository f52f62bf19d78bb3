"""hidden-route: let every token read only the input features of a projection that matter for it.

Input j of ``y = W x`` contributes ``x_j W[:, j]``; where that matters little it is left out and its
weight column is not read. TEAL (arXiv:2408.14690) scores by ``|x_j|`` alone, and WINA
(arXiv:2505.19427) by ``|x_j| * ||W[:, j]||``; here the column is measured by how far it moves what
the model says (:mod:`sparsify.sensitivity`: the root mean square of its product with the gradient).
No router is needed and nothing is trained. It works on every projection of attention and
feed-forward layers: q, k, v, o, gate, up, down. After ffn-moe it works inside the experts: of the
live experts' neurons, a token reads those rows of the down projection that matter. Unlike in the
papers, all features of all projections are priced on one scale (squared scores add up to what the
prediction moves, to second order), so that layers and roles which can spare more do; thresholds
settle on what the sparse layers before really send; and a dead input counts as what dead inputs are
on the calibration text, not as zero (a constant, so it costs nothing): GELU's neurons, most of the
time, are all near the same small negative value.

Models that predict no tokens (encoders) score by the column's norm, and the scale is what a budget
costs relative to the residual stream.

With ``gated``, the up projection of a gated layer leaves out neurons too, where their gate is
nearly shut: of as many operations, both together lose a third of what inputs alone lose
(:mod:`sparsify.runtime.gated`; operations, not bytes).

At initialization, every feature live, the sum runs over the same products: REORDERED. Without
calibration data each token takes the same number of features (top-k).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from sparsify.core import Pass, Refused, Rewrite, Splice, option
from sparsify.regions import FeedForward, Projection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.budget import Rule
    from sparsify.runtime.inputs import Magnitude

# An error of a query or key moves the softmax, not only a sum. Measured on SmolLM2 at half of all
# inputs (perplexity ratio on 2,000 tokens): weighed 1, 2, 3, 4, 8 times: 1.36, 1.29, 1.32, 1.32,
# 1.38. Weighing gate, up or down and output differently gave nothing.
SCORES_WEIGH = 2.0
# Under score=slope: what is lost of a layer's neurons weighs less than its second order says.
# Feed-forward layers of SmolLM2 at half of the operations, KL to dense on two texts (2 x 1,000
# tokens): 0.245, 0.276 with one, 0.235, 0.257 with this.
DOWN_WEIGHS = 1 / 1.5
# Of all inputs, those that die while stand-ins are found. SmolLM2 (score=slope, as above): found at
# each layer's own share of dead inputs instead, 0.250, 0.270 against 0.245, 0.276. MiniLM
# (score=wina), feed-forward layers, cosine to the dense embedding with stand-ins found at 50, 70
# and 90 % dead, and with plain means: with up and down at 70 and 30 %: 0.973, 0.979, 0.966, 0.935;
# at 85 and 65 %: 0.9985, 0.9979, 0.9962, 0.9938.
DEAD_OF_SLOPES, DEAD = 0.5, 0.65
TOKENS = 512  # calibration tokens kept per projection: each gives as many scores as it has features


@dataclasses.dataclass(frozen=True)
class HiddenRoute(Pass[Projection]):
    """Projection -> the same, over the input features that are live for the token."""

    works_inside: ClassVar[bool] = True
    active: float = option(1.0, "fraction of input features that a token uses", gt=0, le=1)
    score: str = option(
        "slope",
        "|x_j| times: slope = how far it moves the prediction (calibrated; else wina), wina = the "
        "norm of its weight column, teal = 1",
        among=("slope", "wina", "teal"),
    )
    router: str = option(
        "auto",
        "auto = threshold if calibrated, else top-k",
        among=("auto", "threshold", "top-k"),
    )
    gated: bool = option(
        False, "up projections (calibrated, score=slope) leave out neurons of small gates too"
    )
    compensate: bool = option(True, "dead features count as what they are on average, not as zero")

    def check(self, projection: Projection) -> None:
        if projection.linear.weight.shape[1] < 2:
            raise Refused("a single input feature cannot be routed")
        if projection.host is not None and projection.role not in projection.host.module.hosts:
            raise Refused(
                f"{projection.blocked}; inside, weights are stored neuron by neuron: a row of down "
                f"can be skipped, an input column of {projection.role} is strided"
            )
        if self.router == "threshold" and "x" not in projection.samples:
            raise Refused(
                "threshold routing needs calibration data",
                suggestion="give calibration=..., or router=top-k",
            )

    def taps(self, region: Projection) -> Mapping[str, int]:
        wanted = {"x": TOKENS}
        if "stream" in region.ports and not region.time_major:  # rows in one order
            wanted |= dict.fromkeys(("y.energy", "result.energy", "stream.energy"), TOKENS)
        if self.score == "slope":
            wanted["x.slope"] = 1
            if self.gated and "gate" in region.ports:
                wanted["gate"] = TOKENS
        return wanted

    def rewrite(self, projection: Projection) -> Rewrite:
        from sparsify.passes._gates import open_gates
        from sparsify.runtime.gated import GatedLinear
        from sparsify.runtime.inputs import RoutedLinear
        from sparsify.weights import packed_projection

        linear = projection.linear
        select = self._select(projection)
        fitted = "calibrated" if "x" in projection.samples else "uncalibrated"
        score = self.score if self.score != "slope" or "x.slope" in projection.samples else "wina"
        note = f"{projection.role}: {select.routed} inputs, {score} score, "
        note += f"{select.rule} ({fitted})"
        if projection.host is not None:
            from sparsify.runtime.ffn import RoutedFFN
            from sparsify.runtime.inside import LiveNeurons

            ffn = projection.host.module
            assert isinstance(ffn, RoutedFFN)
            inside = LiveNeurons.within(select, ffn.order, ffn.experts)
            return Rewrite((), note=f"inside the experts, {note}", hosted=inside)
        moved = packed_projection(projection, "routed", "columns", "transposed")
        found = open_gates(projection, select) if self.gated and select.selector.mean else None
        if found is not None:
            gated = GatedLinear.from_gated(linear.weight, linear.bias, *found)
            note += f", {len(linear.weight)} neurons by their gates"
            return Rewrite((Splice("routed", gated, ("x", "gate"), "projection"),), moved, note)
        module = RoutedLinear.from_dense(linear.weight, linear.bias, select)
        return Rewrite((Splice("routed", module, ("x",), "projection"),), moved, note)

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.gated import GatedLinear
        from sparsify.runtime.inputs import RoutedLinear
        from sparsify.runtime.inside import LiveNeurons

        if isinstance(module, LiveNeurons):
            module.settle(inputs[0], alone=alone)
            return None
        assert isinstance(module, RoutedLinear)
        select = module.select
        select.settle(select.scores(select.centred(inputs[0])), alone=alone)
        if isinstance(module, GatedLinear):
            module.follow()
            module.neurons.settle(module.neurons.scores(inputs[1]), alone=alone)
        return None

    def _select(self, projection: Projection) -> Magnitude:
        import torch

        from sparsify.passes._dead_inputs import cut_losses, usual
        from sparsify.passes._ridge import relative_losses
        from sparsify.runtime.inputs import Magnitude

        weight = projection.linear.weight.detach().float()
        norms = weight.norm(dim=0)
        slope = projection.samples.get("x.slope") if self.score == "slope" else None
        if slope is not None:
            scale = slope[0].sqrt()
        else:
            scale = norms.new_ones(len(norms)) if self.score == "teal" else norms
        cost = float(weight.shape[0])
        x = projection.samples.get("x")
        if x is None:
            return Magnitude(scale, rule="top-k", unit_cost=cost)
        dead = DEAD if slope is None else DEAD_OF_SLOPES
        centre = usual(x, scale, dead) if self.compensate else None
        rule: Rule = "top-k" if self.router == "top-k" else "threshold"
        select = Magnitude(scale, centre, rule=rule, unit_cost=cost)
        whole, x = x, select.centred(x)
        if slope is not None:
            weighs = DOWN_WEIGHS if projection.role == "down" else 1.0
            select.calibrate(x, weighs * select.scores(x).square())
            return select
        energy = (x.float() * norms).square()
        if projection.ports["y"] is not projection.ports["result"]:
            # an error of y changes the larger region's result in proportion, to first order
            inner = projection.samples.get("y.energy")
            outer = projection.samples.get("result.energy")
            if inner is not None and outer is not None:
                energy = energy * (outer / inner.clamp_min(1e-30))
            if {"query", "key"} & set(projection.role.split("+")):
                energy = energy * SCORES_WEIGH
        select.calibrate(x, relative_losses(energy, projection.samples))
        run = _layer(projection)
        if run is not None and select.errors is not None:
            middle = torch.zeros_like(whole[0]) if centre is None else centre
            stream = projection.samples["stream.energy"]
            select.errors = cut_losses(run, whole, middle, select.scores(x), stream)
        return select


def _layer(projection: Projection) -> Callable[[Tensor], Tensor] | None:
    """The feed-forward layer from the projection's input on, where it has no gate.

    There, what is lost is measured. Estimated from energies as for other projections, the up
    projections of MiniLM get too little (they come out near 0.5 where 0.65 is best), as their
    outputs are mostly means, which no error of x changes: cosine 0.976 instead of 0.982.
    """
    from torch.nn.functional import linear

    ffn = projection.within
    if not isinstance(ffn, FeedForward) or ffn.gate is not None:
        return None
    up, down, activation = ffn.up, ffn.down.weight.detach(), ffn.activation
    if projection.role == "down":
        return lambda hidden: linear(hidden, down)
    return lambda x: linear(activation(linear(x, up.weight.detach(), up.bias)), down)
