"""depth-mor: recurse a stack of layers; a router gives every token the depth that it needs.

Mixture-of-Recursions (Bae et al., arXiv:2507.10524): the stack is cut into ``recursions`` equal
steps that are one block applied again (``sharing`` says which layers they are; ``layers-tie`` with
the same options makes them share weights). Every token runs the first step, fewer and fewer run the
next ones; a token that leaves keeps its stream up to the end of the recursion. ``choice=expert``
decides anew before every step, ``choice=token`` once, after the first. Routers are fitted to
predict how much the steps ahead change a token (the paper trains them); where causal or calibrated,
tokens are judged alone by thresholds, which is the same while decoding (the paper trains an
auxiliary loss for that); ``router=top-k`` is its expert choice over the tokens of each sequence.
Without data the thresholds are a standard normal's, and budgets hold roughly only.

``kv=recursion`` (the paper's recursion-wise caching): in every step, live tokens attend to the
tokens that are live in it; the cache slot of a token that left holds zeros. ``kv=shared`` (its
recursive sharing): all steps read the keys and values of the first one, so a token that left stays
attendable, and only the first step's cache is kept. ``kv=all`` (the default where keys are cached):
every step computes keys and values for every token from the stream that it has; see depth-mod for
why a model that was not trained for it needs that.

All tokens live to full depth, the layers are computed as the model wrote them: EXACT; with
``kv=shared`` later steps read other keys than the dense model's: APPROXIMATE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from sparsify.core import (
    APPROXIMATE,
    EXACT,
    Claim,
    Pass,
    Refused,
    Rewrite,
    Splice,
    option,
)
from sparsify.passes._sharing import SCHEMES, runs
from sparsify.regions import Layer, Stack

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.runtime.depth import DepthRouter


@dataclasses.dataclass(frozen=True)
class DepthMor(Pass[Stack]):
    """Stack of layers -> recursion steps that only some tokens run."""

    claim: ClassVar[Claim] = EXACT
    moves_weights: ClassVar[bool] = False

    active: float = option(
        1.0, "fraction of (token, step) pairs that are computed after the first step", gt=0, le=1
    )
    recursions: int = option(2, "steps, the first included", ge=2)
    sharing: str = option("cycle", "which layers are a step, as in layers-tie", among=SCHEMES)
    choice: str = option(
        "expert",
        "expert = decided before every step; token = the depth is decided once",
        among=("expert", "token"),
    )
    kv: str = option(
        "auto",
        "all = keys and values of every token; recursion = of the tokens that are live in the step;"
        " shared = those of the first step; auto = all where keys are cached",
        among=("auto", "all", "recursion", "shared"),
    )
    router: str = option(
        "auto",
        "threshold = each token judged alone; top-k = the best tokens of each sequence; "
        "auto = threshold if causal or calibrated, else top-k",
        among=("auto", "threshold", "top-k"),
    )
    compensate: bool = option(True, "add the mean change of the easier half of tokens when skipped")

    def check(self, stack: Stack) -> None:
        from sparsify.passes._depth import attends_to_all, check_layer

        if self.choice == "token" and self.router == "top-k":
            raise Refused(
                "token choice judges every token alone", suggestion="router=threshold, or auto"
            )
        for steps in runs(len(stack.layers), self.sharing, self.recursions):
            for layer, source in _pairs(stack, steps):
                check_layer(layer, source if self.kv == "shared" else None)
                attends_to_all(layer, self.kv)

    def taps(self, region: Stack) -> Mapping[str, int]:
        from sparsify.passes._depth import TOKENS

        return dict.fromkeys((p for p in region.ports if p.split(".")[0] in ("x", "y")), TOKENS)

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.recursion import RecursionRouter

        if isinstance(module, RecursionRouter):
            before = inputs[1] if len(inputs) > 1 else None
            module.settle(module.among(module.scores(inputs[0]), before), alone=alone)
        return None

    def rewrite(self, stack: Stack) -> Rewrite:
        from sparsify.bodies import hand_over
        from sparsify.passes._depth import attends_to_all, is_causal, routed_layer

        splices: list[Splice] = []
        moved: dict[str, str] = {}
        plan = runs(len(stack.layers), self.sharing, self.recursions)
        routed: list[tuple[Layer, Layer]] = []
        everyone = all(attends_to_all(layer, self.kv) for layer in stack.layers)
        for number, steps in enumerate(plan):
            last = ""
            for step, layers in enumerate(steps[1:], 2):
                decides = self.choice == "expert" or step == 2
                if decides:
                    router, easier = self._router(stack, steps, step)
                    name = f"router_{number}_{step}"
                    before = (last,) if last else ()
                    splices.append(Splice(name, router, (_port(layers[0]), *before)))
                    last = name
                for place, index in zip(steps[0], layers, strict=True):
                    layer, source = stack.layers[index], stack.layers[place]
                    keys = source if self.kv == "shared" else layer if everyone else None
                    splice, inside = routed_layer(
                        stack,
                        layer,
                        f"layer.{index}",
                        last,
                        unit=step - 2 if self.choice == "token" else 0,
                        dropped=self._dropped(stack, index, easier),
                        source=keys,
                    )
                    splices.append(splice)
                    moved |= inside
                    routed.append((layer, source))
        claim = None
        if self.kv == "shared":
            claim = APPROXIMATE
            for layer, source in routed:
                hand_over(layer, source)
        note = self._note(stack, plan, router)
        if everyone:
            note += ", keys and values of every token"
        elif self.kv != "shared" and is_causal(stack.layers[0]):
            note += ", cache slots of tokens that left are empty"
        return Rewrite(tuple(splices), (), note, moved=moved, claim=claim)

    def _note(self, stack: Stack, plan: Sequence[Sequence[range]], router: DepthRouter) -> str:
        steps = " | ".join(_shown(steps) for steps in plan)
        fitted = "calibrated" if stack.samples else "from weights"
        note = (
            f"{self.recursions} steps ({steps}), {self.choice} choice by {router.rule} ({fitted})"
        )
        if self.kv == "shared":
            return note + ", all steps attend to the keys and values of the first"
        return note

    def _router(
        self, stack: Stack, steps: Sequence[range], step: int
    ) -> tuple[DepthRouter, Tensor | None]:
        """The router before ``step``, and which calibration tokens are the easier half for it."""
        from sparsify.passes._depth import (
            easier_half,
            is_causal,
            normal_quantiles,
            plain_weight,
            rule_for,
            updates,
        )
        from sparsify.passes._ridge import fit_router
        from sparsify.runtime.recursion import DepthChoice, RecursionRouter

        first = stack.layers[steps[0][0]]
        dtype = first.gm.meta.get("dtype")

        def made(weight: Tensor, bias: Tensor | None, quantiles: Tensor | None) -> DepthRouter:
            if self.choice == "token":
                return DepthChoice(weight, bias, steps=len(steps), quantiles=quantiles)
            rule = rule_for(self.router, is_causal(first), bool(stack.samples))
            return RecursionRouter(
                weight, bias, step=step, steps=len(steps), rule=rule, quantiles=quantiles
            )

        if not stack.samples:
            weight = plain_weight(stack.width, 1, steps[step - 1][0]).to(dtype)
            return made(weight, None, normal_quantiles()), None
        ahead = steps[step - 1 :] if self.choice == "token" else steps[step - 1 : step]
        x = stack.samples[_port(ahead[0][0])]
        y = stack.samples[_port(ahead[-1][-1] + 1, len(stack.layers))]
        unit, energy, _ = updates({"x": x, "y": y})
        weight, bias = fit_router(unit, energy)
        router = made(weight.to(dtype), bias.to(dtype), None)
        router.calibrate(x.to(dtype))
        return router, easier_half(router, x.to(dtype)) if self.compensate else None

    def _dropped(self, stack: Stack, index: int, easier: Tensor | None) -> Tensor | None:
        """(D,) what a token that skips the layer gets: the mean change of the easier half."""
        if easier is None:
            return None
        x = stack.samples[_port(index)]
        y = stack.samples[_port(index + 1, len(stack.layers))]
        dtype = stack.layers[index].gm.meta.get("dtype")
        return (y.float() - x.float())[easier].mean(0).to(dtype)


def _port(index: int | range, count: int | None = None) -> str:
    """The stack's port of the stream before a layer; after the last where ``index == count``."""
    at = index[0] if isinstance(index, range) else index
    if at == count:
        return "y"
    return f"x.{at}" if at else "x"


def _pairs(stack: Stack, steps: Sequence[range]) -> list[tuple[Layer, Layer]]:
    """Every layer after the first step, with the layer of the first step at its place."""
    return [
        (stack.layers[index], stack.layers[place])
        for layers in steps[1:]
        for place, index in zip(steps[0], layers, strict=True)
    ]


def _shown(steps: Sequence[range]) -> str:
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in steps)
