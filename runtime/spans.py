"""Attention whose heads each look a span back (and forth): keys beyond it are not multiplied.

Mixture of Attention (Fu et al., arXiv:2406.14909): the span of a head for N keys is
``alpha + beta * N`` with a beta of its own, and the first few keys (sinks) stay visible to all. The
model's own masks apply as they are, so padding and the key/value cache need no extra care: the
distance of a query to a key is counted from the last key, which is the last query's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import HALF
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK = 64  # queries multiplied together with the keys that any of them sees
MASKED = -1e4  # a score at or below this is masked by the model
SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_SIZES = ("heads", "kv_heads", "head_dim", "value_dim", "causal", "alpha", "sinks", "steps")


def split_softmax(score: Program) -> tuple[Program, Program]:
    """A score program as (up to the softmax, from it on); BadInput where that is not possible.

    The second takes the scores that the softmax reads and nothing else.
    """
    for at, step in enumerate(score.steps):
        source = step.args[0] if step.args else None
        if step.op.split(".")[1] in SOFTMAX and isinstance(source, Ref):
            first = Step(step.name, step.op, (Ref("masked"), *step.args[1:]), step.kwargs)
            before = Program(score.inputs, score.steps[:at], source.name, score.wide)
            rest = (first, *score.steps[at + 1 :])
            try:
                return before, Program(("masked",), rest, score.output, score.wide)
            except Exception as error:  # a later step reads what came before the softmax
                raise BadInput("the scores are read after the softmax, too") from error
    raise BadInput("the score program has no softmax")


@routed
class SpanAttend(RoutedModule):
    """``softmax(score(q k^T)) v`` over the keys within each head's span.

    Args:
        score: program on (scores, op0, ...) that ends in probabilities, elementwise but for one
            softmax over the keys.
        heads, kv_heads, head_dim, value_dim, causal: as in :class:`RoutedAttend`.
        alpha: keys that every head sees, its own included; sinks: first keys that all see.
        steps: G; with g of its units live, a head sees ``alpha + g / G * N`` of N keys, with all
            G every key.
        budget: the dial over H * G units.
        order: int64 (H * G,): the head that each unit belongs to, most useful first; None = the
            heads in turn.
    """

    order: Tensor

    def __init__(
        self,
        score: Program,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool,
        alpha: int,
        sinks: int,
        steps: int,
        budget: Prefix,
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.score = score
        self.before, self.after = split_softmax(score)
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.causal = causal
        self.alpha, self.sinks, self.steps = alpha, sinks, steps
        if budget.units != heads * steps:
            raise BadInput(f"{heads} heads of {steps} steps need a dial of {heads * steps} units")
        self.budget = budget
        self.register_buffer(
            "order", torch.arange(heads * steps) % heads if order is None else order
        )
        self.dtype = dtype

    def spans(self, keys: int) -> list[int]:
        """Keys that each head sees to one side, its own included, of ``keys``."""
        live = torch.bincount(self.order[: self.budget.count], minlength=self.heads).tolist()
        return [
            keys if g == self.steps else min(keys, self.alpha + math.ceil(g / self.steps * keys))
            for g in live
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv) -> (B, H, T, dv)."""
        batch, heads, tokens, _ = q.shape
        keys = k.shape[2]
        self.dtype = k.dtype
        wide = torch.float32 if q.dtype in HALF else q.dtype
        spans = self.spans(keys)
        offset = 0 if self.causal else keys - tokens
        past = self.causal or min(spans) >= keys or self._masks_future(q, keys, operands)
        y = q.new_zeros(batch, heads, tokens, v.shape[3], dtype=wide)
        seen = 0
        for span in sorted(set(spans)):
            mine = [head for head, own in enumerate(spans) if own == span]
            at = torch.tensor(mine, device=q.device)
            block = tokens if span >= keys else BLOCK
            parts = []
            for start in range(0, tokens, block):
                window = _Window(start, min(start + block, tokens), keys, span, offset, past)
                part, live = self._block(q, k, v, operands, at, window)
                parts.append(part)
                seen += live
            y = y.index_copy(1, at, torch.cat(parts, dim=2).to(wide))
        self.counter.seen(batch * heads * tokens, keys, seen)
        return y.to(v.dtype)

    def _block(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: tuple[Tensor, ...],
        at: Tensor,
        window: _Window,
    ) -> tuple[Tensor, int]:
        """Queries of a block, for the heads ``at``: (B, h, t, dv), and the pairs within spans."""
        group = at // (self.heads // self.kv_heads)
        columns = window.columns(self.sinks, q.device)
        rows = slice(window.start, window.stop)
        wide = torch.float32 if q.dtype in HALF else q.dtype
        queries = q[:, at, rows].to(wide)
        scores = queries @ k[:, group][:, :, columns].to(wide).transpose(2, 3)
        self.counter.rows += scores.numel()
        mine = [_part(operand, at, rows, columns) for operand in operands]
        place = torch.arange(window.start, window.stop, device=q.device) + window.offset
        distance = place.unsqueeze(1) - columns
        dead = (distance.abs() >= window.span) & (columns >= self.sinks)
        backward = window.past and window.span < window.keys
        live = int((~dead & (distance >= 0) if backward else ~dead).sum())
        if self.causal:
            dead = dead | (distance < 0)
        masked = self.before(scores, *mine).masked_fill(dead, float("-inf"))
        share = self.after(masked).to(wide)
        return share @ v[:, group][:, :, columns].to(wide), live * len(q) * len(at)

    def _masks_future(self, q: Tensor, keys: int, operands: tuple[Tensor, ...]) -> bool:
        """Whether the model masks every key after the query: then none needs to be multiplied."""
        tokens = q.shape[2]
        if tokens == 1:
            return True
        free = self.before(q.new_zeros(1, 1, tokens, keys, dtype=torch.float32), *operands)
        future = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).triu(keys - tokens + 1)
        return bool((free.masked_fill(~future, -math.inf) <= MASKED).all())

    def options(self) -> dict[str, Any]:
        return {
            "score": self.score.to_json(),
            "dtype": dtype_name(self.dtype),
            "budget": self.budget.spec(),
            **{name: getattr(self, name) for name in _SIZES},
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        sizes = {name: options[name] for name in _SIZES}
        return cls(
            Program.from_json(options["score"]),
            dtype=dtype_of(options["dtype"]),
            budget=nested(options["budget"], Prefix),
            **sizes,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        seen = float(sum(min(context, s + self.sinks) for s in self.spans(context)))
        width = self.head_dim + self.value_dim
        share = seen / max(self.heads, 1) * self.kv_heads
        return Cost(2 * seen * width, cache=share * width * self.dtype.itemsize)

    def extra_repr(self) -> str:
        return f"{self.heads} heads, alpha={self.alpha}, {self.steps} steps, {self.sinks} sinks"


@dataclasses.dataclass(frozen=True, slots=True)
class _Window:
    """Queries ``start`` to ``stop``, the first at key ``start + offset``, and what they see."""

    start: int
    stop: int
    keys: int
    span: int
    offset: int
    past: bool

    def columns(self, sinks: int, device: torch.device) -> Tensor:
        """int64: keys that any of the queries sees, sinks first; all where the span covers all."""
        if self.span >= self.keys:
            return torch.arange(self.keys, device=device)
        low = max(0, self.start + self.offset - self.span + 1)
        last = self.stop - 1 + self.offset
        high = min(self.keys, last + 1 if self.past else last + self.span)
        first = torch.arange(min(sinks, low), device=device)
        return torch.cat([first, torch.arange(low, high, device=device)])


def _part(operand: Tensor, heads: Tensor, rows: slice, columns: Tensor) -> Tensor:
    """The operand's part for these heads, queries and keys; dimensions of size one stay."""
    if operand.dim() >= 1 and operand.shape[-1] > 1:
        operand = operand[..., columns]
    if operand.dim() >= 2 and operand.shape[-2] > 1:
        operand = operand[..., rows, :]
    if operand.dim() >= 3 and operand.shape[-3] > 1:
        operand = operand.index_select(-3, heads)
    return operand
