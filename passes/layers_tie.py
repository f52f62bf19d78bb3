"""layers-tie: let repeated layers share their weights, each with a low-rank residual of its own.

Relaxed recursive transformers (Bae et al., arXiv:2410.20672): projections of the same role in tied
layers become ``S + U_i V_i``, S the mean of their weights and ``U_i V_i`` the best low-rank
approximation of ``W_i - S`` by SVD, on the layer's own inputs where calibration data are given (the
paper's is that of the plain weights). Which layers are tied follows the sharing schemes of
Mixture-of-Recursions (arXiv:2507.10524), the same as in depth-mor. ``rank`` is what is stored,
``active`` what is computed of it: at ``rank=1`` nothing is lost, and the layers are larger than
they were (an (m, n) weight has m + n numbers per rank); below ``rank`` = m n / (m + n) / min(m, n)
they shrink.

At full rank the sum is the dense projection up to rounding: BOUNDED. With ``rank`` below one the
residual is cut for good: APPROXIMATE.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import APPROXIMATE, BOUNDED, Pass, Refused, Rewrite, Splice, option
from sparsify.passes._sharing import SCHEMES, groups
from sparsify.regions import Projection

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 2048  # calibration tokens kept per projection


@dataclasses.dataclass(frozen=True)
class LayersTie(Pass[Projection]):
    """Projection -> shared weight + low-rank residual."""

    claim = BOUNDED(1e-5)

    active: float = option(1.0, "fraction of the stored rank that is live", gt=0, le=1)
    sharing: str = option("cycle", "which layers share, as in Mixture-of-Recursions", among=SCHEMES)
    recursions: int = option(2, "layers that share one weight", ge=2)
    rank: float = option(1.0, "rank of the residual that is stored, as a fraction", gt=0, le=1)

    def check(self, projection: Projection) -> None:
        from sparsify.passes._lowrank import check_wide

        check_wide(projection.linear.weight)
        members = self._members(projection)
        free = [p for p in members if p.rewritten_by in (None, self.name) and p.blocked is None]
        if len(free) < 2:
            raise Refused("the other layers of its group were rewritten: nothing to share with")
        if len({p.linear.weight_name for p in members}) == 1 and projection.linear.rows is None:
            raise Refused(f"the layers share {projection.linear.weight_name} already")
        if len({p.linear.weight.shape for p in members}) > 1:
            raise Refused("the layers of its group differ in shape")

    def _members(self, projection: Projection) -> list[Projection]:
        """The projections that share one weight, this one included."""
        peers = projection.peers
        if not peers:
            raise Refused("it lies in no run of repeated layers")
        index = next(at for at, peer in enumerate(peers) if peer is projection)
        for group in groups(len(peers), self.sharing, self.recursions):
            if index in group:
                return [peers[at] for at in group]
        raise Refused(f"the first and the last layer stay alone under sharing={self.sharing}")

    def taps(self, region: Projection) -> Mapping[str, int]:
        comparable = "stream" in region.ports and not region.time_major  # rows in one order
        energies = ("y.energy", "result.energy", "stream.energy") if comparable else ()
        return dict.fromkeys(("x", *energies), TOKENS)

    def rewrite(self, projection: Projection) -> Rewrite:
        from sparsify.passes._lowrank import weighted_svd
        from sparsify.runtime.prefix import Prefix
        from sparsify.runtime.router import own
        from sparsify.runtime.tied import TiedLinear
        from sparsify.weights import packed_projection

        linear, x = projection.linear, projection.samples.get("x")
        shared = self._shared(projection)
        rest = linear.weight.double() - shared.double()
        up, values = weighted_svd(rest, x)
        lost = values[: min(rest.shape)].square()
        size = max(1, math.ceil(self.rank * len(lost) - 1e-9))
        left_out = float(lost[size:].sum() / lost.sum().clamp_min(1e-300))
        up, lost = up[:, :size], lost[:size]
        trains, dtype = linear.weight.requires_grad, linear.weight.dtype
        rank = Prefix(
            size,
            errors=_errors(lost, projection.samples),
            unit_cost=float(sum(linear.weight.shape)),
        )
        module = TiedLinear(
            shared,
            up.T.to(dtype).contiguous().requires_grad_(trains),
            (up.T @ rest).to(dtype).requires_grad_(trains),
            None if linear.bias is None else own(linear.bias),
            rank=rank,
        )
        tied = len(self._members(projection))
        how = "mean of the tied layers, plus up^T down"
        note = f"{projection.role}: shared by {tied} layers, rank {size} of {min(rest.shape)}"
        if size < min(rest.shape):
            note += f" ({left_out:.0%} of the residual's energy cut)"
            how += ", cut"
        splice = Splice("tied", module, ("x",), "projection")
        moved = packed_projection(projection, "tied", "shared", how)
        claim = None if size == min(rest.shape) else APPROXIMATE
        return Rewrite((splice,), moved, note, claim=claim, length=projection.length + size)

    def _shared(self, projection: Projection) -> Tensor:
        """The group's weight: the parameter of a member that is tied already, or the mean."""
        import torch
        from torch import nn

        from sparsify.runtime.tied import TiedLinear

        members = [p for p in self._members(projection) if p.blocked is None]
        for member in members:
            made = member.made.get("tied")
            if isinstance(made, TiedLinear):
                return made.shared
        free = [p.linear.weight for p in members if p.rewritten_by is None]
        mean = torch.stack([weight.detach().double() for weight in free]).mean(0)
        trains = any(weight.requires_grad for weight in free)
        return nn.Parameter(mean.to(free[0].dtype), requires_grad=trains)


def _errors(lost: Tensor, samples: Mapping[str, Tensor]) -> Tensor | None:
    """The error table: what dead ranks take from the projection, relative to the stream."""
    from sparsify.runtime.budget import error_table

    if "stream.energy" not in samples:
        return None
    y, result, stream = (
        float(samples[f"{port}.energy"].double().mean().clamp_min(1e-30))
        for port in ("y", "result", "stream")
    )
    # an error of y changes the larger region's result in proportion, to first order
    return error_table(lost.flip(0), result / y / stream)
