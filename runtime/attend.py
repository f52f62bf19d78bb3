"""Routed attention: scores, softmax and weighted sum for live (token, head) pairs only.

The live queries of one batch row and one key/value head form a matrix, whatever their token and
query head: one product with that head's keys, one with its values. What the model does to its
scores (scale, masks, biases, caps, softmax) runs on those rows as the model wrote it. Keys and
values are complete, so every later token can attend to every position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import HALF, join_graph
from sparsify.runtime.program import Program
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self

_SIZES = ("heads", "kv_heads", "head_dim", "value_dim", "causal", "time_major")
ROOM = 1 << 25  # scores held at once: 128 MiB in float32


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Live pairs ``start`` to ``stop``, all of one key/value head (counted over the batch)."""

    group: int
    start: int
    stop: int


@routed
class RoutedAttend(RoutedModule):
    """``softmax(score(q k^T)) v`` for the live pairs, zeros for the others.

    Args:
        score: program on (scores, op0, op1, ...) that ends in probabilities; elementwise, with the
            softmax over the last dimension.
        heads: H query heads; kv_heads: G key/value heads, each serving H/G neighbouring ones.
        head_dim: d; value_dim: dv.
        causal: query t attends to keys 0..t (aligned top left, as sdpa's ``is_causal``); masked
            before the score program runs.
        time_major: the selection's rows run over (T, B), as in ``nn.MultiheadAttention``.
        dtype: of the key/value cache, for the cost; follows what ``forward`` sees.
    """

    def __init__(
        self,
        score: Program,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool = False,
        time_major: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if kv_heads < 1 or heads % kv_heads:
            raise BadInput(f"{heads} heads cannot share {kv_heads} key/value heads evenly")
        self.score = score
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.causal = causal
        self.time_major = time_major
        self.dtype = dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, select: Tensor, *operands: Tensor) -> Tensor:
        """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv), select (B, T, H) -> (B, H, T, dv).

        With ``time_major``, select is (T, B, H).

        Operands broadcast to (B, H, T, S).
        """
        found: Tensor | None = self.lowered(q, k, v, select, *operands)
        if found is not None:
            return found
        batch, heads, tokens, _ = q.shape
        self.dtype = k.dtype
        if self.time_major:
            select = select.reshape(tokens, batch, heads).transpose(0, 1)
        live = select.expand(batch, tokens, heads).transpose(1, 2) != 0
        together = heads // self.kv_heads * tokens
        counts = live.reshape(batch * self.kv_heads, together).sum(1).tolist()
        pairs = batch * tokens
        self.counter.seen(pairs, heads, sum(counts))
        wide = torch.float32 if q.dtype in HALF else q.dtype
        if self.dispatch == "auto" and sum(counts) == pairs * heads:
            y = self._dense(q.to(wide), k.to(wide), v.to(wide), operands)
        else:
            y = self._grouped(q, k, v, live, counts, wide, operands)
        return join_graph(y, q, k, v).to(v.dtype)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """All pairs are live: heads that share keys are one matrix."""
        batch, heads, tokens, width = q.shape
        keys, together = k.shape[2], heads // self.kv_heads * tokens
        grouped = q.reshape(batch, self.kv_heads, together, width)
        scores = (grouped @ k.transpose(2, 3)).view(batch, heads, tokens, keys)
        if self.causal:
            future = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        share = self.score(scores, *operands).to(v.dtype)
        self.counter.rows += batch * heads * tokens
        rows = share.reshape(batch, self.kv_heads, together, keys) @ v
        return rows.view(batch, heads, tokens, v.shape[3])

    def _grouped(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        live: Tensor,
        counts: list[int],
        wide: torch.dtype,
        operands: tuple[Tensor, ...],
    ) -> Tensor:
        batch, heads, tokens, width = q.shape
        keys, out = k.shape[2], v.shape[3]
        at = live.reshape(-1).nonzero().flatten()  # (b, h, t) in order: group by group
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        done = []
        for chunk in _chunks(counts, max(1, ROOM // max(keys, 1))):
            place = at[chunk[0].start : chunk[-1].stop]
            rows = q.reshape(-1, width).index_select(0, place).to(wide)
            spans = [piece.stop - piece.start for piece in chunk]
            parts = torch.split(rows, spans)
            scores = torch.cat(
                [
                    part @ k[piece.group].to(wide).t()
                    for part, piece in zip(parts, chunk, strict=True)
                ]
            )
            token = place % tokens
            if self.causal:
                future = torch.arange(keys, device=q.device) > token.unsqueeze(1)
                scores = scores.masked_fill(future, float("-inf"))
            head, row = place // tokens % heads, place // (tokens * heads)
            mine = [_rows(operand, row, head, token) for operand in operands]
            share = torch.split(self.score(scores, *mine).to(wide), spans)
            for part, piece in zip(share, chunk, strict=True):
                done.append(part @ v[piece.group].to(wide))
                self.counter.rows += len(part)
        y = q.new_zeros(batch * heads * tokens, out, dtype=wide)
        if done:
            y = y.index_copy(0, at, torch.cat(done))
        return y.view(batch, heads, tokens, out)

    def options(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in _SIZES}
        return {"score": self.score.to_json(), "dtype": dtype_name(self.dtype), **sizes}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        sizes = {name: options[name] for name in _SIZES}
        score, dtype = Program.from_json(options["score"]), dtype_of(options["dtype"])
        return cls(score, dtype=dtype, **sizes)

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = 1.0 if active is None else active
        width = self.head_dim + self.value_dim
        # a key/value head is read unless all query heads that share it are dead
        read = 1 - (1 - share) ** (self.heads // self.kv_heads)
        return Cost(
            flops=2 * share * self.heads * context * width,
            cache=read * self.kv_heads * context * width * self.dtype.itemsize,
        )

    def extra_repr(self) -> str:
        return f"{self.heads} heads, {self.kv_heads} key/value heads, causal={self.causal}"


def _chunks(counts: list[int], most: int) -> Iterator[list[_Piece]]:
    """Pieces that cover all pairs in order, in lists of at most ``most`` pairs."""
    chunk: list[_Piece] = []
    room, start = most, 0
    for group, count in enumerate(counts):
        end = start + count
        while start < end:
            taken = min(room, end - start)
            chunk.append(_Piece(group, start, start + taken))
            start += taken
            room -= taken
            if not room:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk


def _rows(operand: Tensor, row: Tensor, head: Tensor, token: Tensor) -> Tensor:
    """The operand's rows for these pairs: (P, S), (1, S), or as it is where it has no rows."""
    if operand.dim() < 2:
        return operand
    full = operand.reshape((1,) * (4 - operand.dim()) + tuple(operand.shape))
    if all(have == 1 for have in full.shape[:3]):
        return full[0, 0]
    index = [
        at if have > 1 else torch.zeros_like(at)
        for at, have in zip((row, head, token), full.shape[:3], strict=True)
    ]
    return full[index[0], index[1], index[2]]
