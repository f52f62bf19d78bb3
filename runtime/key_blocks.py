"""Blocks of keys: how a sequence or a grid is cut into them, and which ones a query selects.

Mixture of Block Attention (MoBA, Lu et al., arXiv:2502.13189) cuts the sequence; every query keeps
the blocks whose mean key it matches best, and its own. Video MoBA (Wu et al., arXiv:2506.23858)
cuts the grid of a video along time, space or both, in turn over the layers, and lets the queries of
a head select together: the best (query, block) pairs, or as many of them as hold a share of the
similarity, which is ``(s - min s) / (max s - min s)`` over the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.errors import BadInput

SELECTIONS = ("top-k", "global", "threshold")


def tile_of_layer(grid: Sequence[int], tile: Sequence[int], layer: int) -> tuple[int, ...]:
    """What one block of a layer spans along each axis: the tile, or the whole axis.

    Three axes (time, height, width): frames, columns through all frames, then cuboids, in turn.
    Two axes: bands of rows, then tiles.
    """
    turns: dict[int, tuple[tuple[int, ...], ...]] = {
        2: ((0,), (0, 1)),
        3: ((0,), (1, 2), (0, 1, 2)),
    }
    cut = turns[len(grid)][layer % len(turns[len(grid)])]
    return tuple(
        min(part, size) if axis in cut else size
        for axis, (size, part) in enumerate(zip(grid, tile, strict=True))
    )


def members(
    keys: int,
    block: int,
    grid: Sequence[int] = (),
    tile: Sequence[int] = (),
    device: torch.device | None = None,
) -> Tensor:
    """int64 (S,): the block of every key.

    Without a grid, runs of ``block`` keys. With one, its tiles, the last of an axis smaller where
    the tile does not divide it; further keys (class tokens, text) come first, in runs of as many.
    """
    if not grid:
        return torch.arange(keys, device=device) // block
    wanted = math.prod(grid)
    if keys < wanted:
        shown = "x".join(map(str, grid))
        raise BadInput(
            f"{keys} keys do not fill a grid of {shown}", help=f"inputs of {wanted} tokens or more"
        )
    number = torch.zeros((), dtype=torch.int64, device=device)
    for size, part in zip(grid, tile, strict=True):
        here = torch.arange(size, device=device) // part
        number = number.unsqueeze(-1) * math.ceil(size / part) + here
    number = number.flatten()
    if keys == wanted:
        return number
    first = torch.arange(keys - wanted, device=device) // math.prod(tile)
    return torch.cat([first, number + first[-1] + 1])


def select(
    scores: Tensor,
    visible: Tensor,
    own: Tensor,
    active: float,
    selection: str,
    *,
    together: bool,
) -> Tensor:
    """bool (B, H, T, N): the blocks that each query keeps.

    Args:
        scores: (B, H, T, N), a query's product with the mean key of a block.
        visible: bool, blocks that the query may see; own: bool, the one it lies in: always kept.
        active: share of the visible blocks, own ones included, rounded up (``top-k`` per query;
            ``global`` over a head); of the similarity (``threshold``). What ranks first holds at
            least its share, so a threshold keeps at most ``active`` of the blocks, rounded up, and
            own blocks.
        together: the queries of a head select together under ``global`` and ``threshold``. Else
            each selects alone, and its own block holds no similarity: a causal query's own block
            has keys after it.
    """
    shape = scores.shape
    pooled = together and selection != "top-k"
    if pooled:
        scores, visible, own = scores.flatten(2), visible.flatten(2), own.flatten(2)
    if selection == "threshold":
        kept = _similar(scores, visible if together else visible & ~own, own, active)
    else:
        kept = _best(scores, visible, own, active)
    return ((kept & visible) | own).view(shape)


def _best(scores: Tensor, visible: Tensor, own: Tensor, active: float) -> Tensor:
    """The best ``active`` of the visible ones (..., N), rounded up; own ones rank first."""
    keys = scores.masked_fill(~visible, -math.inf).masked_fill(own, math.inf)
    rank = keys.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    count = (visible.sum(-1, keepdim=True).double() * active - 1e-9).ceil()
    return rank < count


def _similar(scores: Tensor, counted: Tensor, own: Tensor, active: float) -> Tensor:
    """The first until ``active`` of the similarity of the counted is held; own ones rank first.

    Where all are equally similar, each counts the same.
    """
    scores = scores.double()
    low = scores.masked_fill(~counted, math.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~counted, -math.inf).amax(-1, keepdim=True)
    weight = torch.where(high > low, (scores - low) / (high - low), 1.0).masked_fill(~counted, 0.0)
    order = (weight + 2.0 * own).argsort(dim=-1, descending=True, stable=True)
    ranked = weight.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    enough = before >= active * weight.sum(-1, keepdim=True) - 1e-9
    return torch.zeros_like(counted).scatter(-1, order, ~enough)
