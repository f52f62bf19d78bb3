"""A routed feed-forward layer whose dead experts modulate what the live ones give.

Compressed experts (He et al., arXiv:2503.00634): the highest ranked experts of a token, its main
experts, are computed; each of the others is a vector that multiplies, element by element, what the
main experts work on. See :mod:`sparsify.passes.ffn_compressed` for what is theirs and what is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dropped import at_budget
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class CompressedFFN(RoutedFFN):
    """``y = s * (1 + sum of dead experts' vectors) + what stands in for dead experts``.

    s (T, D) is the sum of the token's live experts, the down bias with it.

    Args:
        vectors: (R, D) or (P, R, D), one per routed expert, as its difference from the identity
            (a vector of ones), so that half types keep its digits. None = the identity.
        vectors_at: the P ascending budgets that a (P, R, D) table was fitted at.
        options: of :class:`RoutedFFN`.
    """

    def __init__(
        self,
        *tensors: Tensor | None,
        vectors: Tensor | None = None,
        vectors_at: Sequence[float] = (),
        **options: Any,
    ) -> None:
        super().__init__(*tensors, **options)  # type: ignore[arg-type]
        if self.copies or self.router.order is not None:
            raise BadInput("compressed experts are parts of one layer, routed in order")
        shape = (self.router.routed, self.width)
        if vectors is None:
            vectors = self.up.new_zeros(shape)
        table = (len(vectors_at), *shape) if vectors_at else shape
        if vectors.shape != table:
            raise BadInput(f"vectors of compressed experts must be {table}, not {vectors.shape}")
        trains = vectors.requires_grad or not isinstance(vectors, nn.Parameter)
        self.vectors = as_parameter(vectors.detach(), trains)
        self.vectors_at = tuple(float(a) for a in vectors_at)

    def _modulated(self, y: Tensor, select: Tensor) -> Tensor:
        routed = select[:, self.router.shared :]
        # With weights of one, a dead expert's indicator carries the router's gradient as well:
        # making the expert live takes its vector away.
        dead = 1 - routed if self.router.unit_weights else routed == 0
        with torch.autocast(y.device.type, enabled=False):
            change = dead.to(y.dtype) @ self._vectors().to(y.dtype)
            return torch.addcmul(y, y, change)

    def _vectors(self) -> Tensor:
        return at_budget(self.vectors, self.vectors_at, self.router.active)

    def add_vectors(self, active: float, vectors: Tensor) -> None:
        """Put the vectors (R, D) fitted at one budget into the table."""
        rows = dict(zip(self.vectors_at, self.vectors.detach(), strict=False))
        rows = {a: row for a, row in rows.items() if abs(a - active) > 1e-3}
        rows[active] = vectors.to(self.vectors)
        self.vectors_at = tuple(sorted(rows))
        table = torch.stack([rows[a] for a in self.vectors_at])
        self.vectors = as_parameter(table, self.vectors.requires_grad)

    def without_vectors(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the vectors are fitted to, at the present budget.

        Args:
            x: (T, D); scores: (T, R) of the router.

        Returns:
            dead (T, R) bool; what the live experts give (T, D), bias included; and what is missing
            from the dense layer's output (T, D), once dead experts' stand-ins are added. Float32 or
            wider.
        """
        live = self.router.live(scores, self.router.extra_scores(x))
        keep = nn.functional.pad(live, (self.router.shared, 0), value=1) != 0
        neurons = self.neurons(x)
        wide = torch.promote_types(neurons.dtype, torch.float32)
        neurons, down = neurons.to(wide), self.down.to(wide).flatten(0, 1)
        kept = neurons * keep.repeat_interleave(self.hidden, dim=1)
        missing = (neurons - kept) @ down
        for left, right in self._stand_ins(keep, scores):
            missing -= left.to(wide) @ right.to(wide)
        given = kept @ down
        return ~live, given if self.down_bias is None else given + self.down_bias, missing

    def options(self) -> dict[str, Any]:
        return {**super().options(), "vectors_at": list(self.vectors_at)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        module = super().from_options(options)
        at = tuple(options["vectors_at"])
        empty = module.vectors.new_empty((*([len(at)] if at else []), *module.vectors.shape))
        module.vectors, module.vectors_at = as_parameter(empty, True), at
        return module

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        base = super().cost(active)
        router = self.router
        if router.live_units(router.active if active is None else active) >= self.experts:
            return base
        weights = router.routed * self.width
        return base + Cost(2 * weights, weights * self.vectors.element_size())
