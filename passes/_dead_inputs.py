"""Dead inputs of a matrix: what stands in for them, and what is lost by them all together.

The stand-in is the value that an input usually has, given that it dies. An input dies where it is
close to its stand-in, so the best one is the mean of those close by, not of all: where values pile
up on one side (GELU's neurons: most a little below zero, few far above) the two lie far apart.
Found as in Lloyd's algorithm: dead inputs, their means, and again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.runtime.budget import ERROR_POINTS

ROUNDS = 3
LEAST = 8  # dead values that a mean is taken of
CUTS = 17  # shares of dead inputs that losses are measured at


def usual(x: Tensor, scale: Tensor, dead: float) -> Tensor:
    """Stand-ins for the inputs of a matrix.

    Args:
        x: (T, in) calibration rows; scale: (in,) what a difference of each input counts for.
        dead: share of all inputs that die.

    Returns:
        (in,).
    """
    wide = x.float()
    centre = wide.median(0).values
    lowest = max(round(dead * x.numel()), 1)
    for _ in range(ROUNDS):
        away = (wide - centre).abs() * scale
        dying = away <= away.flatten().kthvalue(lowest).values
        count = dying.sum(0)
        near = (wide * dying).sum(0) / count.clamp_min(1)
        centre = torch.where(count >= LEAST, near, centre)
    return centre.to(x.dtype)


def cut_losses(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    centre: Tensor,
    scores: Tensor,
    stream: Tensor | None = None,
) -> Tensor:
    """What is lost when inputs die together, measured: an error table.

    Sums of what single inputs lose are wrong where those that die for a token err to the same side,
    and where a nonlinearity follows that is far from linear over such a change.

    Args:
        run: (T, in) -> (T, out), the layer from these inputs on.
        x: (T, in); centre: (in,) stand-ins; scores: (T, in), the lowest die first.
        stream: (T, 1) squared size of what the result is added to; None = one.

    Returns:
        (ERROR_POINTS,) mean over the tokens of the squared error, relative to ``stream``, at
        shares of dead inputs from zero to one.
    """
    want, ordered = run(x), scores.flatten().sort().values
    found = [scores.new_zeros(())]
    for share in range(1, CUTS):
        last = ordered[round(share / (CUTS - 1) * (len(ordered) - 1))]
        lost = (run(torch.where(scores > last, x, centre)) - want).float().square()
        size = lost.sum(1, keepdim=True)
        found.append((size if stream is None else size / stream.clamp_min(1e-30)).mean())
    table = torch.stack(found).float().view(1, 1, -1)
    between = torch.nn.functional.interpolate(
        table, size=ERROR_POINTS, mode="linear", align_corners=True
    )
    return between.flatten()
