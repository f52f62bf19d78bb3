"""ffn-bits: experts as in ffn-moe, their weights stored in few bits, more where it matters.

MC-MoE (Huang et al., arXiv:2410.06270): experts differ in how often they are used and in what
rounding does to them, so bits are allotted by an integer programme: one width from 2 to 8 bits per
expert, the average within ``bits``, the least sum of output error times use. Errors are estimated
on as many tokens for every expert, those that it is chosen for (MoEQuant, arXiv:2505.03804). Codes
are symmetric, with one scale per ``group`` of neighbouring weights, and clipped where that loses
less; routers, biases and what stands in for dead experts stay as they are. Stand-ins are fitted
with the rounded experts.

Ours, where the papers quantise by GPTQ: nearest codes, without error feedback. Their online pruning
of experts for unimportant tokens is ``prune`` of ``router=top-k``; under a threshold, the default
with calibration data, a token takes as many as it needs anyway.

At ``bits=16`` nothing is rounded, and this is ffn-moe: REORDERED. Below, APPROXIMATE: a weight that
is not clipped is off by half a scale at most, and the remark says by how much the worst one is. The
rounded weights cannot be trained, and no kernel reads them yet.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparsify.core import APPROXIMATE, Moved, Refused, Rewrite, option
from sparsify.passes import ffn_moe
from sparsify.regions import FeedForward

if TYPE_CHECKING:
    from sparsify.runtime.ffn import RoutedFFN

WHOLE = 16.0  # bits that mean: as they are
MOST = 8  # bits of a code


@dataclasses.dataclass(frozen=True)
class FfnBits(ffn_moe.FfnMoe):
    """Feed-forward layer -> mixture of experts, stored in few bits."""

    bits: float = option(
        WHOLE, "bits of a weight, mean of the experts: 2 to 8, or 16 = as they are", ge=2, le=16
    )
    allot: str = option(
        "measured",
        "which experts get more: by what they lose, or even = the same for all",
        among=("measured", "even"),
    )
    group: int = option(64, "neighbouring weights that share a scale, at most", ge=1)

    def __post_init__(self) -> None:
        if MOST < self.bits < WHOLE:
            raise Refused(
                f"codes have up to {MOST} bits, not {self.bits:g}",
                suggestion=f"bits={MOST}, or bits={WHOLE:g} for the weights as they are",
            )
        if self.allot == "even" and self.bits % 1:
            raise Refused(
                f"not every expert can have {self.bits:g} bits",
                suggestion="allot=measured mixes whole bits to that mean",
            )

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        from sparsify.passes._bits import allotted, group_of, histogram, losses, worst_error
        from sparsify.runtime.few_bits import FewBitsFFN

        made = super().rewrite(ffn)
        if self.bits == WHOLE:
            return made
        splice = made.splices[0]
        module: RoutedFFN = splice.module  # type: ignore[assignment]
        group = group_of(module, self.group)
        found, importance = losses(module, ffn.samples.get("x"), group)
        even = (int(self.bits),) * module.experts
        bits = even if self.allot == "even" else allotted(found, self.bits)
        few = FewBitsFFN.of(module, bits, group, importance)
        note = f"{made.note}; {histogram(bits)}, {few.mean_bits:.2f} a weight with scales, "
        note += f"a weight off by {worst_error(module, few):.2g} at most"
        return dataclasses.replace(
            made,
            splices=(dataclasses.replace(splice, module=few),),
            weights=tuple(_coded(move) for move in made.weights),
            note=note,
            claim=APPROXIMATE,
        )


def _coded(move: Moved) -> Moved:
    """Where a weight is that was in ``move``, and is rounded now; biases are as they were."""
    if move.role not in ("up", "gate", "down"):
        return move
    return dataclasses.replace(move, sparse=f"{move.sparse}_codes", how=f"{move.how}, rounded")
