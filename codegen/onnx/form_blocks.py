"""The form of attention over selected blocks of keys: all pairs are scored, others masked.

Whether a query may select among blocks after its own follows, in eager, from the masks of a call.
An exported graph is of one kind: what the model's example showed, found by running it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.codegen.onnx.form_attention import future
from sparsify.codegen.onnx.forms import form
from sparsify.runtime.block_attend import BlockAttend
from sparsify.runtime.key_blocks import members, select
from sparsify.runtime.spans import MASKED


@form(BlockAttend)
class BlockForm(BlockAttend):
    """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv) -> (B, H, T, dv)."""

    ordered: bool | None = None  # no query sees a key after it; set by a run of the example

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        repeats = self.heads // self.kv_heads
        keys = k.repeat_interleave(repeats, dim=1)
        scores = self.before(q @ keys.transpose(2, 3), *operands)
        if self.causal:
            scores = scores.masked_fill(future(q, k), -math.inf)
        if self.budget.active < 1:
            scores = scores.masked_fill(~self._kept(q, k, keys, operands), -math.inf)
        return self.after(scores).to(v.dtype) @ v.repeat_interleave(repeats, dim=1)

    def _kept(self, q: Tensor, k: Tensor, wide: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """bool (B, H, T, S): keys in the blocks that each query selects."""
        batch, heads, tokens, _ = q.shape
        keys = k.shape[2]
        zeros = (q[:1, :1, :, :1] * 0) @ (k[:1, :1, :, :1] * 0).transpose(2, 3)
        free = self.before(zeros, *operands) > MASKED
        if self.causal:
            free = free & ~future(q, k)
        later = future(q, k, 0 if self.causal else keys - tokens)
        if self.ordered is None:
            self.ordered = not bool((free & later).any())
        block_of = members(keys, self.block, self.grid, self.tile, q.device)
        inside = self._inside(block_of, keys).to(q.dtype)  # (S, N)
        place = torch.arange(tokens, device=q.device) + (0 if self.causal else keys - tokens)
        own = place.expand(free.shape[:3])
        if self.ordered:
            last = keys - 1 - free.flip(-1).to(torch.int32).argmax(-1)
            own = torch.where(free.any(-1), last, own)
        visible = (free.to(q.dtype) @ inside) > 0
        mine = inside[own] > 0
        visible = (visible | mine).expand(batch, heads, -1, -1)
        mine = mine.expand(batch, heads, -1, -1)
        sizes = inside.sum(0)
        real, sums = mine, inside.T @ wide
        counts = sizes[:, None]
        if not self.ordered:
            used = free.any(2).any(1).expand(batch, keys)
            seen = used[:, None, :, None].to(q.dtype)
            real = used[:, place][:, None, :, None].expand_as(mine)
            sums, counts = inside.T @ (wide * seen), inside.T @ seen
        scores = q @ (sums / counts.clamp(min=1)).transpose(2, 3)
        among = visible if self.ordered else visible & real
        live = self.live_blocks(scores, among, mine & among)
        return ((live | mine).to(q.dtype) @ inside.T) > 0

    def live_blocks(self, scores: Tensor, visible: Tensor, own: Tensor) -> Tensor:
        """bool (B, H, T, N); see :func:`sparsify.runtime.key_blocks.select`."""
        return select(
            scores, visible, own, self.budget.active, self.selection, together=not self.ordered
        )

    def _inside(self, block_of: Tensor, keys: int) -> Tensor:
        """bool (S, N): the block that each key lies in."""
        if self.grid:
            count = int(
                math.prod(math.ceil(a / b) for a, b in zip(self.grid, self.tile, strict=True))
            )
            extra = keys - math.prod(self.grid)
            count += -(-extra // math.prod(self.tile)) if isinstance(extra, int) and extra else 0
            blocks = torch.arange(count, device=block_of.device)
        else:
            blocks = torch.arange((keys + self.block - 1) // self.block, device=block_of.device)
        return block_of.unsqueeze(1) == blocks
