"""ffn-mole: split each feed-forward layer into experts that live in one shared low-rank latent.

Mixture of Latent Experts (MoLAE, Liu et al., arXiv:2503.23100): the weights of expert i become
``A_i B`` with a base B (r x D) that all experts share, so B x is computed once per token and an
expert costs r instead of D per neuron. The fit is least squares, by SVD of the stacked weights of
all experts, weighted by the second moments of calibration samples where there are any. Up and gate
share one latent (one projection serves both); down projections share their output side: what the
live experts add up to in a second latent is projected to D once. Bases have orthonormal rows.

The paper converts mixtures, with a base for up and one for gate per group of k experts, and (as
read here) leaves down projections whole. Here the experts are blocks of a dense layer's neurons, as
in ffn-moe, whose router (on latents) and dial they have. At full rank the products are the dense
weights up to rounding: BOUNDED, by the REORDERED bound of the longer path for the weights' dtype,
and no looser than 1e-5. Only below full rank is anything saved with all experts live, and then
weights are lost whatever is live: APPROXIMATE, measured and reported.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparsify.core import APPROXIMATE, BOUNDED, REORDERED, Rewrite, Splice, option
from sparsify.passes.ffn_moe import FfnMoe
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class FfnMole(FfnMoe):
    """Feed-forward layer -> mixture of experts with shared low-rank bases."""

    claim = BOUNDED(1e-5)

    rank: float = option(1.0, "latent features, as a fraction of the full rank", gt=0, le=1)

    def check(self, ffn: FeedForward) -> None:
        from sparsify.passes._lowrank import check_wide

        check_wide(ffn.up.weight)
        super().check(ffn)

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        import torch

        from sparsify.runtime.ffn import RoutedFFN
        from sparsify.runtime.latent_ffn import LatentFFN
        from sparsify.runtime.router import own
        from sparsify.weights import packed_latents

        full = min(ffn.width, ffn.hidden * (1 if ffn.gate is None else 2))
        rank = max(1, round(self.rank * full))
        latent, read, write = factorised(ffn, rank)
        inner = super().rewrite(latent)
        experts = inner.splices[0].module
        assert isinstance(experts, RoutedFFN)
        module = LatentFFN(
            read, experts, write, None if ffn.down.bias is None else own(ffn.down.bias)
        )
        length = ffn.length + 2 * rank
        roundoff = torch.finfo(read.dtype).eps / 2
        claim = BOUNDED(min(self.claim.eps, REORDERED.tolerance(roundoff, length, 1.0)))
        return Rewrite(
            (Splice("mole", module, ("x",), "ffn"),),
            packed_latents(ffn, "mole"),
            f"{inner.note}, latents of {rank} of {full} features",
            claim=claim if rank == full else APPROXIMATE,
            length=length,
        )

    def settle(self, module: nn.Module, inputs: tuple[Tensor, ...], alone: bool) -> Tensor | None:
        from sparsify.runtime.latent_ffn import LatentFFN

        assert isinstance(module, LatentFFN)
        latents = super().settle(module.experts, (module.project(inputs[0]),), alone)
        return None if latents is None else module.expand(latents)


def factorised(ffn: FeedForward, rank: int) -> tuple[FeedForward, Tensor, Tensor]:
    """The layer in its latents, and the bases read and write (rank, D) around it."""
    import torch

    from sparsify.passes._experts import hidden_of
    from sparsify.passes._lowrank import input_base, output_base

    x = ffn.samples.get("x")
    inner = [part for part in (ffn.up, ffn.gate) if part is not None]
    rows = torch.cat([part.weight.detach() for part in inner])
    factors, read = input_base(rows, rank, x)
    hidden = None if x is None else hidden_of(ffn, x).detach()
    columns, write = output_base(ffn.down.weight.detach(), rank, hidden)
    dtype = rows.dtype
    trains = any(part.weight.requires_grad for part in inner)
    read = read.to(dtype).requires_grad_(trains)
    write = write.to(dtype).requires_grad_(ffn.down.weight.requires_grad)
    parts = [
        dataclasses.replace(part, weight=a.to(dtype).requires_grad_(part.weight.requires_grad))
        for part, a in zip(inner, factors.split(ffn.hidden), strict=True)
    ]
    down = columns.T.to(dtype).requires_grad_(ffn.down.weight.requires_grad)
    samples = dict(ffn.samples)
    if x is not None:
        samples["x"] = x @ read.detach().T.to(x)
    latent = dataclasses.replace(
        ffn,
        up=parts[0],
        gate=parts[1] if ffn.gate is not None else None,
        down=dataclasses.replace(ffn.down, weight=down, bias=None),
        samples=samples,
    )
    return latent, read, write
