"""Dispatch: from a selection to the matmuls that are issued, and to none that are not.

Tokens are grouped by unit. Units that nobody selected appear in no matmul; neighbouring units that
every token uses (all live units, for a single token) become one matmul over a slice of the weights,
which are stored unit after unit for that reason. Python work is per live unit, never per token.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(slots=True)
class Segment:
    """Units ``start`` to ``start + size`` and the tokens that use them all.

    Attributes:
        count: how many tokens; 0 = dead.
        rows: their indices, or None for all tokens in order.
    """

    start: int
    size: int
    count: int
    rows: Tensor | None = None


@dataclasses.dataclass(slots=True)
class Plan:
    """Segments that cover all units in order, for ``tokens`` tokens.

    Attributes:
        mask: (T, N) bool, the live token-unit pairs.
        counts: tokens per unit.
    """

    tokens: int
    units: int
    segments: list[Segment]
    mask: Tensor
    counts: list[int]

    @property
    def live(self) -> int:
        """Live token-unit pairs."""
        return sum(self.counts)

    @property
    def all_live(self) -> bool:
        return self.live == self.tokens * self.units

    def split(self, packed: Tensor | None, dim: int = 0) -> list[Tensor] | list[None]:
        """Unit-major ``packed``, one piece per segment (Nones for None).

        One split instead of slices: its gradient is one concatenation, where every slice would
        fill a zero tensor of the size of all units.
        """
        if packed is None:
            return [None] * len(self.segments)
        return list(torch.split(packed, [s.size for s in self.segments], dim))

    def pairs(self, select: Tensor) -> list[Tensor]:
        """Each segment's weights: (T, size) where it has all tokens, else (count, 1)."""
        parts = list(torch.split(select, [s.size for s in self.segments], 1))
        if any(s.rows is not None for s in self.segments):
            flat = select.t().masked_select(self.mask.t()).unsqueeze(1)
            by_unit = torch.split(flat, self.counts)
            for i, s in enumerate(self.segments):
                if s.rows is not None:
                    parts[i] = by_unit[s.start]
        return parts


def plan(select: Tensor, fuse: bool) -> Plan:
    """Group the tokens of ``select`` (T, N) by unit.

    Args:
        fuse: merge neighbouring units that every token uses; False gathers rows unit by unit.
    """
    tokens, units = select.shape
    mask = select != 0
    counts = [int(c) for c in (mask[0] if tokens == 1 else mask.sum(0)).tolist()]
    segments: list[Segment] = []
    rows: Iterator[Tensor] = iter(())
    if not fuse or any(c not in (0, tokens) for c in counts):
        rows = iter(torch.split(mask.t().nonzero()[:, 1], counts))
    for unit, count in enumerate(counts):
        whole = fuse and count == tokens
        mine = next(rows, None)
        last = segments[-1] if segments else None
        if last and (whole or not count) and last.rows is None and last.count == count:
            last.size += 1
            continue
        segments.append(Segment(unit, 1, count, None if whole or not count else mine))
    return Plan(tokens, units, segments, mask, counts)


@dataclasses.dataclass(slots=True)
class LiveRows:
    """For each of a few tokens on CPU, the weight rows it uses, in order.

    Attributes:
        rows: int64, those of the first token, then the second, ...
        bounds: int64, where each token's begin, and the end; a single token's are cut into as many
            parts as there are threads.
        left: (len(bounds) - 1, D) the token of each part; pattern: sparse, parts by weight rows.
    """

    rows: Tensor
    bounds: Tensor
    left: Tensor
    pattern: Tensor

    @staticmethod
    def of(x: Tensor, mask: Tensor, width: int) -> LiveRows:
        """x (T, D), mask (T, N) of live units, each of which owns ``width`` weight rows."""
        _quiet_sparse()
        rows = mask.repeat_interleave(width, dim=1).nonzero()[:, 1]
        if len(x) == 1:
            bounds = _shares(len(rows), torch.get_num_threads())
            x = x.expand(len(bounds) - 1, -1).contiguous()
        else:
            bounds = torch.nn.functional.pad(mask.sum(1).mul_(width).cumsum(0), (1, 0))
        size = (len(x), mask.shape[1] * width)
        zeros = x.new_zeros(len(rows))
        pattern = torch.sparse_csr_tensor(bounds, rows, zeros, size, check_invariants=False)
        return LiveRows(rows, bounds, x, pattern)

    def dots(self, weight: Tensor) -> Tensor:
        """``weight[row] @ x[token]`` for every pair, reading the rows where they lie.

        Gathering rows first would write and read them once more, and a product per run of
        neighbours pays for every call; a sampled product does neither: 138 us for 768 of 1536 rows
        of 576 in blocks of 24, 42 MB of weights in turn, one thread; one matvec over 768 adjacent
        rows takes 157 us, one per run 232 us.
        """
        product: Tensor = torch.sparse.sampled_addmm(self.pattern, self.left, weight.t(), beta=0.0)
        return product.values()

    def only(self, live: Tensor) -> LiveRows:
        """The rows where ``live``, for :meth:`sums`."""
        before = torch.nn.functional.pad(live.cumsum(0), (1, 0))
        return dataclasses.replace(self, rows=self.rows[live], bounds=before[self.bounds])

    def sums(self, h: Tensor, weight: Tensor, tokens: int) -> Tensor:
        """``sum of h[pair] * weight[row]`` over a token's pairs: (T, D)."""
        bags = torch.nn.functional.embedding_bag(
            self.rows, weight, self.bounds[:-1], mode="sum", per_sample_weights=h
        )
        return bags if tokens == len(bags) else bags.sum(0, keepdim=True)


@functools.lru_cache(maxsize=256)
def _shares(count: int, threads: int) -> Tensor:
    """Bounds of ``count`` items shared out over the threads."""
    with torch.inference_mode(False):  # outlives this call, whose mode may differ from the next's
        return torch.tensor([count * i // threads for i in range(threads + 1)])


@functools.cache
def _quiet_sparse() -> None:
    """torch says once per process that sparse CSR tensors are in beta; not to our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


class Sum:
    """A sum of partial products (T, D), accumulated in ``dtype`` (float32 for half types).

    Each unit contributes to the tokens that use it; rounding every contribution to a half type
    would lose accuracy with the number of units, so the one cast comes at the end.
    """

    def __init__(self, tokens: int, bias: Tensor | None, width: int, like: Tensor) -> None:
        self.dtype = torch.float32 if like.dtype in HALF else like.dtype
        self.shape = (tokens, width)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.total: Tensor | None = None
        self.like = like

    def add(self, rows: Tensor | None, left: Tensor, right: Tensor) -> None:
        """Add ``left (n, k) @ right (k, D)`` to the tokens ``rows`` (None = all)."""
        if torch.is_autocast_enabled(left.device.type):
            with torch.autocast(left.device.type, enabled=False):
                self._add(rows, left.to(self.dtype), right.to(self.dtype))
        else:
            self._add(rows, left.to(self.dtype), right.to(self.dtype))

    def _add(self, rows: Tensor | None, left: Tensor, right: Tensor) -> None:
        start = self.bias if self.total is None else self.total
        if rows is not None:
            self.total = self.value().index_add_(0, rows, left @ right)
        elif start is None:
            self.total = left @ right
        else:
            self.total = torch.addmm(start, left, right)

    def put(self, rows: Tensor | None, product: Tensor) -> None:
        """Add a product (n, D) that is made already to the tokens ``rows`` (None = all)."""
        product, so_far = product.to(self.dtype), self.value()
        self.total = so_far + product if rows is None else so_far.index_add_(0, rows, product)

    def value(self) -> Tensor:
        """The sum so far."""
        if self.total is None:
            zero = self.like.new_zeros(self.shape, dtype=self.dtype)
            self.total = zero if self.bias is None else zero + self.bias
        return self.total


def watched(x: Tensor, module: nn.Module) -> bool:
    """Whether autograd or autocast watches: the paths that write into buffers are closed then."""
    # reading ``device.type`` takes longer than the rest, and a decoded token passes here per module
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return True
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in module.parameters())
    )


def join_graph(y: Tensor, *sources: Tensor) -> Tensor:
    """``y``, differentiable even where nothing was live: ``backward`` then finds zero gradients."""
    if not torch.is_grad_enabled() or y.requires_grad:
        return y
    if not any(s.requires_grad for s in sources):
        return y
    return y + sum((s[:0].sum() for s in sources), start=y.new_zeros(())).to(y.dtype)
