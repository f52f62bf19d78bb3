"""Live neurons of live experts: rows of an expert's down projection that a token does not read.

A routed feed-forward layer stores one row of ``down`` per neuron, expert after expert, so input
routing (:mod:`sparsify.runtime.inputs`) works inside it: of the neurons of a token's live experts
only those that matter are multiplied with their rows. Rows of dead experts are not read anyway, and
what stands in for those experts is not touched.

Shapes: N experts of m neurons, F = N * m, P pairs of a token and an expert that is live for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.dispatch import HALF, Sum
from sparsify.runtime.inputs import FEW, Magnitude, read_few, used_only
from sparsify.runtime.spec import dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(slots=True)
class Run:
    """Neighbouring experts with the tokens that use them all.

    Attributes:
        hidden: (n, size * m) their neurons, without the experts' weights.
        start: the first expert; rows: the tokens, None = all.
        weight: (n, size) or (n, 1) the experts' weights, None = one.
        down: (size * m, D).
    """

    hidden: Tensor
    start: int
    rows: Tensor | None
    weight: Tensor | None
    down: Tensor


@routed
class LiveNeurons(Magnitude):
    """Selects among the neurons of live experts, by ``|h_j - centre_j| * scale_j``.

    ``active`` is the share of the live experts' neurons, whatever the share of live experts: one
    threshold for all, or, under top-k, as many of every live expert (to the nearest whole neuron,
    at least one). The counter counts pairs of a token and a neuron of a live expert.

    Args:
        scale, centre: (F,) in packed order; options: of :class:`Magnitude`.
        experts: N.
    """

    counts: ClassVar[bool] = True

    def __init__(
        self, scale: Tensor, centre: Tensor | None = None, *, experts: int, **options: Any
    ) -> None:
        super().__init__(scale, centre, **options)
        if self.rule not in ("threshold", "top-k"):
            raise BadInput(
                f"neurons of experts are selected by threshold or top-k, not {self.rule}"
            )
        if scale.numel() % experts:
            raise BadInput(f"{scale.numel()} neurons do not divide into {experts} experts")
        self.experts = experts

    @classmethod
    def within(cls, select: Magnitude, order: Tensor | None, experts: int) -> Self:
        """From a selection among a dense layer's neurons; packed row i is ``order[i]`` of it."""

        def packed(values: Tensor) -> Tensor:
            return values.clone() if order is None else values[order]

        return cls(
            packed(select.scale),
            None if select.centre is None else packed(select.centre),
            experts=experts,
            rule=select.selector,
            quantiles=select.quantiles,
            errors=select.errors,
            unit_cost=select.unit_cost,
            active=select.active,
        )

    @property
    def size(self) -> int:
        """m."""
        return self.routed // self.experts

    def offsets(self, down: Tensor) -> Tensor | None:
        """(N, D) what an expert gives with every neuron at its centre; ``down`` is (N, m, D)."""
        if self.centre is None:
            return None
        centre = self.centre.view(self.experts, 1, self.size)
        wide = torch.float32 if down.dtype in HALF else down.dtype
        return (centre.to(wide) @ down.detach().to(wide)).squeeze(1).to(down.dtype)

    # -- selection

    def scores(self, x: Tensor) -> Tensor:
        """(P, m) as :meth:`forward` gets them, scores already: what settling asks for."""
        return x

    def forward(self, scores: Tensor) -> Tensor:
        """scores (P, m) of all live pairs -> bool (P, m)."""
        return self.live(scores)

    def live(self, scores: Tensor, extra: Tensor | None = None) -> Tensor:
        """scores (P, m) -> bool (P, m); each pair for itself."""
        if self.selector.mean:
            return self.keys(scores) > self.threshold
        keep = max(round(self.size * self.budget / self.routed), 1)
        best = scores.topk(keep, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

    def _values(self, hidden: Tensor, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Neurons (..., n) at packed places -> less their centres, and scores (n / m, m)."""
        values = hidden if self.centre is None else hidden - self.centre[at].to(hidden.dtype)
        scores = values.detach().float().abs() * self.scale[at]
        return values, scores.reshape(-1, self.size)

    def _seen(self, tokens: int, pairs: int, live: int) -> None:
        self.counter.tokens += tokens
        self.counter.units_total += pairs * self.size
        self.counter.rows_dense += tokens * self.routed
        self.counter.units_live += live

    # -- the three ways of a routed feed-forward layer

    def add(self, runs: Sequence[Run], total: Sum, *, few: bool) -> None:
        """Add the live neurons of every run to ``total``.

        Args:
            few: runs of a few tokens may read each token's rows where they lie (on CPU, nothing
                watches); others multiply the rows that are live for any of their tokens.
        """
        if not runs:
            return
        found = []
        for run in runs:
            start, wide = run.start * self.size, run.hidden.shape[1]
            found.append(self._values(run.hidden, slice(start, start + wide)))
        pairs = [len(scores) for _, scores in found]
        live = self(torch.cat([scores for _, scores in found]))
        self._seen(total.shape[0], sum(pairs), int(live.sum()))
        for run, (values, _), mask in zip(runs, found, live.split(pairs), strict=True):
            mask = mask.view(values.shape)
            values = values if run.weight is None else weighted(values, run.weight, self.size)
            if few and len(values) <= FEW:
                total.put(run.rows, read_few(values, mask, run.down, self.counter))
            else:
                left, right = used_only(values.masked_fill(~mask, 0.0), mask, run.down)
                total.add(run.rows, left, right)
                self.counter.rows += left.numel()

    def pick(self, hidden: Tensor, rows: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Neurons (P * m,) at packed ``rows``, pair by pair -> less their centres, bool live."""
        values, scores = self._values(hidden, rows)
        live = self(scores).flatten()
        self._seen(tokens, len(scores), int(live.sum()))
        return values, live

    def mask(self, hidden: Tensor, used: Tensor) -> Tensor:
        """All neurons (T, F) -> less their centres, zero where dead; ``used`` (T, N) experts.

        Dead experts are cut too, as they would be if they were live: their routers' gradients
        (:mod:`sparsify.runtime.training`) ask for that.
        """
        values, scores = self._values(hidden, slice(None))
        mine = scores[used.flatten()]
        if len(mine):
            self._seen(len(hidden), len(mine), int(self(mine).sum()))
        self.counter.rows += hidden.numel()
        return values.masked_fill(~self.live_all(scores).view(hidden.shape), 0.0)

    def live_all(self, scores: Tensor) -> Tensor:
        """:meth:`live`, which whoever watches the scores of live pairs does not see."""
        return type(self).live(self, scores)

    # -- description

    def options(self) -> dict[str, Any]:
        return {**super().options(), "experts": self.experts}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        size, centre = options["features"], options["centre"]
        return cls(
            torch.empty(size),
            None if centre is None else torch.empty(size, dtype=dtype_of(centre)),
            experts=options["experts"],
            **cls.budget_arguments(options),
        ).restore(options)

    def extra_repr(self) -> str:
        kind = "" if self.centre is None else f", centred ({dtype_name(self.centre.dtype)})"
        return f"{self.experts} experts of {self.size} neurons, active={self.active:g}{kind}"


def weighted(hidden: Tensor, weight: Tensor, size: int) -> Tensor:
    """(n, e * m) neurons times the weights (n, e) or (n, 1) of their experts."""
    if hidden.dtype in HALF:
        hidden = hidden.float()
    experts = hidden.shape[1] // size
    by_expert = hidden.view(len(hidden), experts, size)
    return (by_expert * weight.unsqueeze(2)).flatten(1)
