"""Mixture of shards: LoRA whose factors are put together from pools that several weights share.

MoS (Wang et al., arXiv:2410.00938). As many numbers train as in LoRA of rank e, but each of the L
weights of one shape gets factors of rank r > e: its vectors are cut into shards, and each place is
filled with a shard of the pool by fixed random indices. The paper's four ways to keep the weights
apart: *subset selection* (no weight gets all shards), *pair dissociation* (A and B are indexed
apart), *vector sharding*, and *shard privatization* (some shards belong to one weight alone).
``B``'s pool starts at zero, so nothing changes at first.

Two choices here that the paper leaves open, or that were not found there: shared shards are dealt
like cards, so all are used equally often (paper: drawn at random); r is 4 e, and a quarter of the
pool, at least a vector where there are two, is private.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.lora import Adapter, adaptable, attach
from sparsify.runtime.lora import add as add_lora

MIXED = 4  # rank of a weight's factors, in ranks that its numbers would pay for
PRIVATE = 4  # one part in so many of a weight's numbers is its own


class Pool(nn.Module):
    """The shards of all weights of one shape.

    Args:
        weights: L, of shape (..., D) with as many rows; like: gives shape, dtype and device.
        rank: e, vectors per weight that the pool holds.
        count: shards of a vector, at most; the largest divisor of its length up to it is taken.
        generator: of the start of ``a`` (uniform in +-1/sqrt(D), as LoRA's).

    Attributes:
        a: (L * e * pieces, D / pieces); b: the same for the rows, zero at first.
    """

    def __init__(
        self, like: Tensor, weights: int, rank: int, count: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        width = like.shape[-1]
        rows = like.numel() // width
        self.rank, self.weights = rank, weights
        self.pieces_a, self.pieces_b = _pieces(width, count), _pieces(rows, count)
        vectors = weights * rank
        a = torch.empty(vectors * self.pieces_a, width // self.pieces_a, dtype=torch.float32)
        a.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        self.a = nn.Parameter(a.to(like))
        self.b = nn.Parameter(like.new_zeros(vectors * self.pieces_b, rows // self.pieces_b))

    def indices(self, mixed: int, pieces: int, generator: torch.Generator) -> list[Tensor]:
        """Per weight, int64 (mixed, pieces): the shard at each place.

        A weight's own shards come once each, at random places; the others of all weights are dealt
        in turn, so that each is used as often as any other, give or take one, and twice in a weight
        only where there are fewer than places.
        """
        own = self.rank // PRIVATE or int(self.rank > 1)
        private = own * pieces
        if self.weights == 1:
            private = 0  # all is its own
        shared = self.weights * (self.rank * pieces - private)
        deck = _deal(self.weights, mixed * pieces - private, shared, generator)
        found = []
        for weight, others in enumerate(deck):
            mine = shared + weight * private + torch.arange(private)
            placed = torch.cat([mine, others])
            shuffled = placed[torch.randperm(len(placed), generator=generator)]
            found.append(shuffled.view(mixed, pieces))
        return found


class Shards(Adapter):
    """An adapter whose factors are made of a pool's shards.

    Args:
        pool: shared by adapters; at_a, at_b: int64 (r, pieces), the shard at each place.
        scale: of the change.
    """

    at_a: Tensor
    at_b: Tensor

    def __init__(self, pool: Pool, at_a: Tensor, at_b: Tensor, scale: float) -> None:
        super().__init__(scale)
        self.pool = pool
        self.register_buffer("at_a", at_a.to(pool.a.device))
        self.register_buffer("at_b", at_b.to(pool.b.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.pool.b[self.at_b].flatten(1).T, self.pool.a[self.at_a].flatten(1)

    def extra_repr(self) -> str:
        rank, pieces = self.at_a.shape
        return f"rank={rank}, {pieces} shards of A, {self.at_b.shape[1]} of B, scale={self.scale:g}"


def add(
    model: nn.Module,
    names: Sequence[str],
    *,
    rank: int = 8,
    count: int = 4,
    alpha: float | None = None,
    seed: int = 0,
) -> dict[str, Shards]:
    """Adapt the parameters ``names`` of ``model``; they are frozen, the pools train.

    :func:`sparsify.runtime.lora.merge`, ``remove`` and ``disabled`` work on the result.

    Args:
        rank: e: as many numbers train as in LoRA of this rank.
        count: shards of a vector, at most.
        alpha: the scale is ``alpha / r``; default ``rank``.
        seed: of the indices and of the start.

    Raises:
        BadInput: as :func:`sparsify.runtime.lora.add`, or ``count`` is below one.
    """
    for name, value in (("rank", rank), ("shards", count)):
        if value < 1:
            raise BadInput(f"{name}={value} is not possible", help="at least 1")
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple[int, int, torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
    for name, weight in adaptable(model, names).items():
        width = weight.shape[-1]
        kind = (weight.numel() // width, width, weight.dtype, weight.device)
        groups.setdefault(kind, {})[name] = weight
    found = {}
    for (rows, width, _, _), group in groups.items():
        used = min(rank, rows, width)
        mixed = min(MIXED * used, rows, width)
        pool = Pool(next(iter(group.values())), len(group), used, count, generator)
        at_a = pool.indices(mixed, pool.pieces_a, generator)
        at_b = pool.indices(mixed, pool.pieces_b, generator)
        scale = (used if alpha is None else alpha * used / rank) / mixed
        for name, a, b in zip(group, at_a, at_b, strict=True):
            found[name] = Shards(pool, a, b, scale)
            attach(model, name, found[name])
    return {name: found[name] for name in names}


def add_adapters(
    model: nn.Module, names: Sequence[str], *, rank: int, count: int, seed: int
) -> None:
    """LoRA of a rank where ``count`` is zero, else shards."""
    if count:
        add(model, names, rank=rank, count=count, seed=seed)
    else:
        add_lora(model, names, rank=rank, seed=seed)


def _pieces(length: int, count: int) -> int:
    """The largest divisor of ``length`` that is at most ``count``."""
    return next(n for n in range(min(count, length), 0, -1) if length % n == 0)


def _deal(hands: int, size: int, cards: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``hands`` times ``size`` of ``cards``, dealt from shuffled decks; none twice in a hand while
    there are others."""
    deck: list[int] = []
    for _ in range(hands):
        hand: list[int] = []
        while len(hand) < size:
            if not deck:
                fresh = torch.randperm(cards, generator=generator).tolist()
                held = set(hand[len(hand) // cards * cards :])
                deck = [c for c in fresh if c not in held] + [c for c in fresh if c in held]
            hand.append(deck.pop(0))
        yield torch.tensor(hand, dtype=torch.int64)
