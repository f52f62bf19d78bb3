"""How the features of an input are grouped into sub-dimensions, and what one is worth for a token.

Shapes: T calibration tokens, D features in N sub-dimensions of c, O rows of the matrices that read
them. ``effect`` (O, D) holds those matrices, each row times how far a change there moves what
counts, so that ``|effect @ dx|`` is what a change ``dx`` of the input does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.core import Refused
from sparsify.passes._experts import divisors_near, hidden_of
from sparsify.passes._ridge import fit_router
from sparsify.regions import FeedForward, LinearWeight
from sparsify.runtime.heads import RoutedColumns
from sparsify.runtime.hidden import HiddenRouter

if TYPE_CHECKING:
    from sparsify.runtime.budget import Rule

MOST = 64  # sub-dimensions by default
LEAST = 4  # features of one, by default
SENSITIVITY_TOKENS = 1024


def default_subdims(width: int) -> int:
    """The largest count up to MOST that divides the features into blocks of at least LEAST."""
    fitting = [n for n in range(2, MOST + 1) if width % n == 0 and width // n >= LEAST]
    return max(fitting, default=1)


def sizes(width: int, subdims: int, shared: int) -> tuple[int, int]:
    """(sub-dimensions, shared ones); ``subdims`` 0 and ``shared`` -1 are the defaults."""
    units = subdims or default_subdims(width)
    return units, units // 4 if shared < 0 else shared


def check_subdims(width: int, units: int, shared: int, router: str, *, calibrated: bool) -> None:
    """Refused where ``width`` features do not make ``units`` sub-dimensions, ``shared`` shared.

    Or where the router needs data that is not there.
    """
    if units < 2:
        raise Refused(f"{width} features are too few or do not divide into sub-dimensions")
    if width % units:
        near = divisors_near(width, units)
        raise Refused(
            f"{width} features do not divide into {units} sub-dimensions",
            suggestion=f"subdims={near[0]} ({width} = {near[0]} x {width // near[0]})"
            if near
            else None,
        )
    if shared >= units:
        raise Refused(
            f"{shared} shared of {units} sub-dimensions leave none to route",
            suggestion=f"shared={units // 4}",
        )
    if router in ("threshold", "static") and not calibrated:
        raise Refused(
            f"{router} routing needs calibration data",
            suggestion="give calibration=..., or router=top-k",
        )


def feature_order(effect: Tensor, x: Tensor | None) -> Tensor:
    """int64 (D,): features by what they add beyond their mean, most first.

    Neighbours form a sub-dimension, so the shared ones hold the features that always matter.
    """
    size = effect.square().sum(0)
    energy = size if x is None else size * x.float().var(0)
    return energy.argsort(descending=True, stable=True)


def ffn_effect(ffn: FeedForward, x: Tensor | None) -> Tensor:
    """(O, D) of up and gate: rows weighted by how far their neuron's sum moves the output.

    To first order, ``h_up * |w_down|`` where ``h_up`` is the root mean square derivative of the
    activation at calibration tokens; without them, ``|w_down|``.
    """
    down = ffn.down.weight.float().norm(dim=0)
    parts = [ffn.up.weight.float()]
    if ffn.gate is not None:
        parts.append(ffn.gate.weight.float())
    slopes = [torch.ones_like(down) for _ in parts]
    if x is not None:
        slopes = _slopes(ffn, x[:: max(1, len(x) // SENSITIVITY_TOKENS)])
    return torch.cat([w * (down * s)[:, None] for w, s in zip(parts, slopes, strict=True)])


def _slopes(ffn: FeedForward, x: Tensor) -> list[Tensor]:
    """Root mean square derivative of each neuron by its up and gate sums: (F,) each."""
    sums = []
    for part in (ffn.up, ffn.gate):
        if part is not None:
            sums.append(torch.nn.functional.linear(x, part.weight, part.bias).detach())
    with torch.enable_grad():
        leaves = [s.requires_grad_() for s in sums]
        found = torch.autograd.grad(ffn.activation(*leaves).sum(), leaves)
    return [g.float().square().mean(0).sqrt() for g in found]


def block_energy(effect: Tensor, x: Tensor, order: Tensor, units: int) -> Tensor:
    """(T, N): squared effect of replacing a sub-dimension by its mean."""
    columns = effect.T[order].view(units, -1, len(effect))
    gram = columns @ columns.transpose(1, 2)
    parts = (x.float() - x.float().mean(0))[:, order].view(len(x), units, -1).transpose(0, 1)
    return ((parts @ gram) * parts).sum(-1).T.contiguous()


def hidden_router(
    effect: Tensor,
    x: Tensor | None,
    order: Tensor,
    units: int,
    shared: int,
    *,
    rule: str,
    power: float,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> HiddenRouter:
    """The router of the sub-dimensions ``order`` in ``units``, the first ``shared`` always live.

    Calibrated: ridge regression of log energy on magnitudes; ``static`` keeps the mean of the log
    energy only, so the same sub-dimensions are live for every token (static pruning, to compare).
    From the weights: the sum over a sub-dimension of ``|x_j|`` times the norm of column j (WINA's
    score, arXiv:2505.19427, summed over the block).

    Args:
        scale: (T, 1) squared size of what the effect is compared with in the error table, or None.
    """
    width = len(order)
    routed = units - shared
    if x is None:
        norm = effect.norm(dim=0)
        weight = torch.zeros(units, width)
        block = torch.arange(units).repeat_interleave(width // units)
        weight[block, order] = norm[order]
        made: Rule = "top-k"
        return HiddenRouter(weight[shared:].to(dtype), power=power, shared=shared, rule=made)
    energy = block_energy(effect, x, order, units)[:, shared:]
    weight, bias = fit_router(x.abs(), energy)
    if rule == "static":
        bias = energy.double().mean(0).clamp_min(1e-30).log()
        weight = torch.zeros(routed, width)
    made = "threshold" if rule in ("auto", "threshold") else "top-k"
    router = HiddenRouter(weight.to(dtype), bias.to(dtype), power=power, shared=shared, rule=made)
    losses = None if scale is None else energy / scale.clamp_min(1e-30)
    router.calibrate(x, losses)
    return router


def columns_of(
    linear: LinearWeight, order: Tensor, units: int, x: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(unit_columns (N, c), what dead sub-dimensions give on average (N, out) or None)."""
    unit_columns = order.view(units, -1)
    if x is None:
        return unit_columns, None
    mean = x.float().mean(0)[unit_columns].unsqueeze(1)
    blocks = linear.weight.float().T[unit_columns]
    return unit_columns, (mean @ blocks).squeeze(1).to(linear.weight.dtype)


def packed_columns(
    linear: LinearWeight, order: Tensor, units: int, x: Tensor | None
) -> RoutedColumns:
    """A projection with its input columns by sub-dimension."""
    unit_columns, dropped = columns_of(linear, order, units, x)
    return RoutedColumns.from_dense(linear.weight, linear.bias, unit_columns, dropped)


def mean_output(ffn: FeedForward, x: Tensor) -> Tensor:
    """(D,): the layer's mean result over the calibration tokens."""
    hidden = hidden_of(ffn, x).float().mean(0)
    y = ffn.down.weight.float() @ hidden
    return y if ffn.down.bias is None else y + ffn.down.bias.float()


def stacked(linears: Sequence[LinearWeight], x: Tensor | None) -> Tensor:
    """(O, D) effect of projections of one input: each relative to the size of its own output."""
    parts = []
    for linear in linears:
        weight = linear.weight.float()
        if x is None:
            size = weight.norm() / len(weight) ** 0.5
        else:
            y = torch.nn.functional.linear(x.float(), weight)
            size = y.square().sum(1).mean().sqrt()
        parts.append(weight / size.clamp_min(1e-12))
    return torch.cat(parts)
