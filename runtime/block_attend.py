"""Attention whose queries select blocks of keys: other blocks are neither scored nor summed.

Blocks and selections are those of :mod:`sparsify.runtime.key_blocks` (MoBA, arXiv:2502.13189;
Video MoBA, arXiv:2506.23858). The model's masks apply as they are. Where no query of a call sees a
key after it, the model is causal: every query selects alone, among blocks before its own. Blocks
lie at multiples of their size from the first cached key and all keys of a block are averaged, so a
query selects the same in one call over the sequence and with a cache, token by token; on a row that
is padded on the left, blocks are shifted. Elsewhere keys that no query sees are not averaged.

Means are not kept between calls: the keys (not the values) of all blocks are read once a call, to
average them, and :meth:`BlockAttend.cost` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import HALF
from sparsify.runtime.key_blocks import SELECTIONS, members, select
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.program import Program
from sparsify.runtime.spans import MASKED, split_softmax
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self

_SIZES = ("heads", "kv_heads", "head_dim", "value_dim", "causal", "block", "selection")


@routed
class BlockAttend(RoutedModule):
    """``softmax(score(q k^T)) v`` over the blocks of keys that each query and head selects.

    Args:
        score: program on (scores, op0, ...) that ends in probabilities, elementwise but for one
            softmax over the keys.
        heads, kv_heads, head_dim, value_dim, causal: as in :class:`RoutedAttend`.
        block: keys per block, where there is no grid.
        grid: sizes of the grid that the keys fill, its last axis running fastest; tile: what a
            block spans along each axis.
        selection: of :func:`sparsify.runtime.key_blocks.select`.
        budget: the dial. Its ``active`` is read, not its units: how many blocks there are is known
            at a call. At one, nothing is selected.
    """

    def __init__(
        self,
        score: Program,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool,
        block: int,
        selection: str,
        budget: Prefix,
        grid: Sequence[int] = (),
        tile: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if selection not in SELECTIONS:
            raise BadInput(f"no selection of blocks is called '{selection}'", help=str(SELECTIONS))
        if len(grid) != len(tile):
            raise BadInput(f"a grid of {len(grid)} axes and a tile of {len(tile)} do not match")
        self.score = score
        self.before, self.after = split_softmax(score)
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.causal = causal
        self.block, self.selection = block, selection
        self.grid, self.tile = tuple(grid), tuple(tile)
        self.budget = budget
        self.dtype = dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv) -> (B, H, T, dv)."""
        self.dtype = k.dtype
        wide = torch.float32 if q.dtype in HALF else q.dtype
        q = q.to(wide)
        if self.dispatch == "auto" and self.budget.active >= 1:
            return self._whole(q, k, v, operands).to(v.dtype)
        tokens, keys = q.shape[2], k.shape[2]
        block_of = members(keys, self.block, self.grid, self.tile, q.device)
        with torch.no_grad():
            free = self._free(q, keys, operands)
            live, visible = self.live(q, k, free, block_of)
        picked = _Picked(live, _Blocks(block_of), self.kv_heads)
        rows = q.reshape(-1, q.shape[3])
        products = []
        for (b, g, n), row in picked.groups:
            part = rows[row] @ picked.blocks.of(k[b, g], n).to(wide).T
            self.counter.rows += part.numel()
            products.append(functional.pad(part, (0, picked.blocks.most - part.shape[1])))
        sizes = torch.bincount(block_of)
        self.counter.tokens += len(rows)
        self.counter.units_total += int((visible * sizes).sum())
        self.counter.units_live += int((live * sizes).sum())
        self.counter.rows_dense += len(rows) * keys
        scores = q.new_zeros(len(rows) * picked.most, picked.blocks.most)
        scores = scores.index_copy(0, picked.places, torch.cat(products))
        key = picked.keys.view(*q.shape[:3], -1)
        mine = [_at(operand, key) for operand in operands]
        dead = picked.dead.view_as(key)
        if self.causal:
            dead = dead | (key > torch.arange(tokens, device=q.device).unsqueeze(1))
        masked = self.before(scores.view(key.shape), *mine).masked_fill(dead, -math.inf)
        share = self.after(masked).to(wide).reshape(scores.shape)[picked.places]
        sums, start = [], 0
        for (b, g, n), row in picked.groups:
            values = picked.blocks.of(v[b, g], n).to(wide)
            sums.append(share[start : start + len(row), : len(values)] @ values)
            start += len(row)
        y = q.new_zeros(len(rows), v.shape[3]).index_add(0, picked.rows, torch.cat(sums))
        return y.view(*q.shape[:3], -1).to(v.dtype)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """All blocks are live: one product."""
        k, v = (x.to(q.dtype).repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        scores = q @ k.transpose(2, 3)
        self.counter.seen(scores[..., 0].numel(), scores.shape[3], scores.numel())
        self.counter.rows += scores.numel()
        if self.causal:
            future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
            return self.after(
                self.before(scores, *operands).masked_fill(future, -math.inf)
            ).to(q.dtype) @ v  # fmt: skip
        return self.after(self.before(scores, *operands)).to(q.dtype) @ v

    def _free(self, q: Tensor, keys: int, operands: tuple[Tensor, ...]) -> Tensor:
        """bool (B or 1, H or 1, T, S): the pairs that the model itself does not mask."""
        tokens = q.shape[2]
        free = self.before(q.new_zeros(1, 1, tokens, keys), *operands) > MASKED
        if self.causal:
            free = free & torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril()
        return free

    def live(self, q: Tensor, k: Tensor, free: Tensor, block_of: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks that each query and head attends to, and those it may: bool (B, H, T, N) both."""
        batch, heads, tokens, _ = q.shape
        keys, blocks = k.shape[2], int(block_of.max()) + 1
        place = torch.arange(tokens, device=q.device) + (0 if self.causal else keys - tokens)
        later = torch.arange(keys, device=q.device) > place.unsqueeze(1)
        ordered = not bool((free & later).any())
        own = place.expand(free.shape[:3])
        if ordered:  # a cache of fixed size has unwritten keys after the query's own
            last = keys - 1 - free.flip(-1).to(torch.uint8).argmax(-1)
            own = torch.where(free.any(-1), last, own)
            if self.grid and tokens > 1:
                raise BadInput(
                    "blocks of a grid do not go with a causal mask",
                    why="the mean key of a block would hold keys after the query",
                    help="compile it without grid, or keep it out with skip=PATH",
                )
        shape = (batch, heads, tokens, blocks)
        visible = _pooled(free.int(), 3, block_of, blocks) > 0
        mine = torch.zeros_like(visible).scatter(-1, block_of[own].unsqueeze(-1), True)
        visible = (visible | mine).expand(shape)
        mine = mine.expand(shape)
        if self.budget.active >= 1:
            return visible, visible
        seen = k.new_ones(batch, 1, keys, 1, dtype=q.dtype)
        real = mine
        if not ordered:  # keys that no query sees are padding, and so are the queries at them
            used = free.any(2).any(1).expand(batch, keys)
            seen = used[:, None, :, None].to(q.dtype)
            real = used[:, place][:, None, :, None].expand(shape)
        sums = _pooled(k.to(q.dtype) * seen, 2, block_of, blocks)
        mean = sums / _pooled(seen, 2, block_of, blocks).clamp(min=1)
        scores = q @ mean.repeat_interleave(heads // self.kv_heads, dim=1).transpose(2, 3)
        among = visible if ordered else visible & real
        live = select(
            scores, among, mine & among, self.budget.active, self.selection, together=not ordered
        )
        return live | mine, visible

    def options(self) -> dict[str, Any]:
        return {
            "score": self.score.to_json(),
            "dtype": dtype_name(self.dtype),
            "budget": self.budget.spec(),
            "grid": list(self.grid),
            "tile": list(self.tile),
            **{name: getattr(self, name) for name in _SIZES},
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        sizes = {name: options[name] for name in (*_SIZES, "grid", "tile")}
        return cls(
            Program.from_json(options["score"]),
            dtype=dtype_of(options["dtype"]),
            budget=nested(options["budget"], Prefix),
            **sizes,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        """Live blocks, and the mean keys where blocks are selected (threshold: at most)."""
        share = self.budget.active if active is None else active
        blocks = math.ceil(context / self.block)
        if self.grid:
            parts = [math.ceil(a / b) for a, b in zip(self.grid, self.tile, strict=True)]
            blocks = min(math.prod(parts), context)
        kept = math.ceil(share * blocks - 1e-9)
        live = kept / max(blocks, 1) * context
        means = blocks if share < 1 else 0
        # a block is read unless no query head that shares the keys selects it
        read = context * (1 - (1 - kept / max(blocks, 1)) ** (self.heads // self.kv_heads))
        width = (context if means else read) * self.head_dim + read * self.value_dim
        flops = self.heads * (live * (self.head_dim + self.value_dim) + means * self.head_dim)
        return Cost(2 * flops, cache=self.kv_heads * width * self.dtype.itemsize)

    def extra_repr(self) -> str:
        cut = f"blocks of {self.block} keys"
        if self.grid:
            cut = f"tiles of {'x'.join(map(str, self.tile))} in {'x'.join(map(str, self.grid))}"
        return f"{self.heads} heads, {cut}, {self.selection}"


class _Blocks:
    """Which keys lie in which block.

    Args:
        block_of: int64 (S,).

    Attributes:
        most: keys of the largest block.
        keys: int64 (N, most), the keys of every block; filled: bool, where there is one.
    """

    def __init__(self, block_of: Tensor) -> None:
        sizes = torch.bincount(block_of)
        self.most = int(sizes.max())
        self.filled = torch.arange(self.most, device=block_of.device) < sizes.unsqueeze(1)
        self.keys = torch.zeros_like(self.filled, dtype=torch.int64)
        self.keys[self.filled] = block_of.argsort(stable=True)
        self._sizes: list[int] = sizes.tolist()
        first = self.keys[:, 0].tolist()
        run = bool((self.keys.diff(dim=1) == 1)[self.filled[:, 1:]].all())
        self._starts: list[int] | None = first if run else None

    def of(self, x: Tensor, block: int) -> Tensor:
        """The rows of x (S, d) in a block; a view where blocks are runs of keys."""
        size = self._sizes[block]
        if self._starts is not None:
            return x[self._starts[block] : self._starts[block] + size]
        return x[self.keys[block, :size]]


class _Picked:
    """The keys of every query's live blocks, block by block, and the products that they take.

    Args:
        live: bool (B, H, T, N); kv_heads: G.

    Attributes:
        groups: (batch row, key/value head, block) and the query rows, in (B * H * T), that are
            multiplied with it together.
        rows: int64, the query rows of all groups, one after the other.
        most: M, blocks that a query has at most.
        places: int64, where in (B * H * T * M) the products of all groups go.
        keys: int64 (B * H * T, M * most of a block), the key at each place; dead: bool, where
            there is none.
    """

    def __init__(self, live: Tensor, blocks: _Blocks, kv_heads: int) -> None:
        batch, count = live.shape[0], live.shape[3]
        self.blocks = blocks
        flat = live.reshape(-1, count)
        slot = flat.cumsum(-1) - 1
        self.most = int(slot[:, -1].max()) + 1
        chosen = live.reshape(batch * kv_heads, -1, count).transpose(1, 2)  # (B * G, N, rows)
        group, block, row = chosen.nonzero(as_tuple=True)
        self.rows = group * chosen.shape[2] + row
        self.places = self.rows * self.most + slot[self.rows, block]
        counts = chosen.sum(-1)
        pieces = self.rows.split(counts[counts > 0].tolist())
        index = [(at // kv_heads, at % kv_heads, n) for at, n in counts.nonzero().tolist()]
        self.groups = list(zip(index, pieces, strict=True))
        number = block.new_full((len(flat) * self.most,), count)  # of no block: the last row below
        number[self.places] = block
        none = blocks.filled.new_zeros(1, blocks.most)
        filled = torch.cat([blocks.filled, none])[number]
        keys = torch.cat([blocks.keys, none.long()])[number]
        self.keys, self.dead = keys.view(len(flat), -1), ~filled.view(len(flat), -1)


def _pooled(x: Tensor, dim: int, block_of: Tensor, blocks: int) -> Tensor:
    """Sums over the keys of each block, along the positive dimension ``dim``."""
    keys = len(block_of)
    size = int((block_of == 0).sum())
    if bool((block_of == torch.arange(keys, device=x.device) // size).all()):  # runs of keys
        full = keys // size * size
        shape = (*x.shape[:dim], full // size, size, *x.shape[dim + 1 :])
        sums = x.narrow(dim, 0, full).reshape(shape).sum(dim + 1)
        if full == keys:
            return sums
        rest = x.narrow(dim, full, keys - full).sum(dim, keepdim=True)
        return torch.cat([sums, rest], dim)
    shape = (*x.shape[:dim], blocks, *x.shape[dim + 1 :])
    return x.new_zeros(shape).index_add(dim, block_of, x)


def _at(operand: Tensor, key: Tensor) -> Tensor:
    """What the operand has for these keys (B, H, T, L); as it is where it is the same for all."""
    if operand.dim() == 0 or operand.shape[-1] == 1:
        return operand
    full = operand.expand(*key.shape[:3], operand.shape[-1])
    return full.gather(-1, key)
