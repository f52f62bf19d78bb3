"""Forms of routed attention: all pairs are scored; dead heads give zero, dead keys get no share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.codegen.onnx.forms import dead_to_zero, form
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program
from sparsify.runtime.spans import SpanAttend, split_softmax


@form(RoutedAttend)
class AttendForm(RoutedAttend):
    """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv), select (B, T, H) -> (B, H, T, dv)."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        select: Tensor,
        *operands: Tensor,
        dead: Tensor | None = None,
    ) -> Tensor:
        """``dead`` (B, S): keys that nobody sees (depth routing around this)."""
        batch, heads, tokens, _ = q.shape
        if self.time_major:
            select = select.reshape(tokens, batch, heads).transpose(0, 1)
        live = select.expand(batch, tokens, heads).transpose(1, 2) != 0
        y = attended(q, k, v, self.score, operands, causal=self.causal, dead=dead)
        return dead_to_zero(y, live.unsqueeze(-1)).to(v.dtype)


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Program,
    operands: tuple[Tensor, ...],
    *,
    causal: bool,
    dead: Tensor | None,
) -> Tensor:
    """(B, H, T, dv): heads that share keys are one matrix."""
    batch, heads, tokens, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    together = q.reshape(batch, kv_heads, heads // kv_heads * tokens, width)
    scores = (together @ k.transpose(2, 3)).reshape(batch, heads, tokens, keys)
    if causal:
        scores = scores.masked_fill(future(q, k), -math.inf)
    if dead is None:
        share = score(scores, *operands)
    else:
        before, after = split_softmax(score)
        masked = before(scores, *operands).masked_fill(dead[:, None, None, :], -math.inf)
        share = after(masked)
    rows = share.reshape(batch, kv_heads, heads // kv_heads * tokens, keys) @ v
    return rows.reshape(batch, heads, tokens, v.shape[3])


def future(q: Tensor, k: Tensor, offset: int = 0) -> Tensor:
    """bool (T, S): keys after the query, the first query being at key ``offset``."""
    tokens, keys = q.shape[2], k.shape[2]
    place = torch.arange(tokens, device=q.device) + offset
    return torch.arange(keys, device=q.device) > place.unsqueeze(1)


@form(SpanAttend)
class SpanForm(SpanAttend):
    """Keys beyond a head's span are scored and masked."""

    def prepare(self) -> None:
        live = torch.bincount(self.order[: self.budget.count], minlength=self.heads)
        self.register_buffer("share", live.double() / self.steps)

    share: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        """q (B, H, T, d), k (B, G, S, d), v (B, G, S, dv) -> (B, H, T, dv)."""
        tokens, keys = q.shape[2], k.shape[2]
        column = torch.arange(keys, device=q.device)
        place = torch.arange(tokens, device=q.device) + (0 if self.causal else keys - tokens)
        distance = place.unsqueeze(1) - column
        span = self.alpha + (self.share * keys).ceil()
        whole = self.share >= 1
        beyond = (distance.abs() >= span[:, None, None]) & ~whole[:, None, None]
        masked = beyond & (column >= self.sinks)  # (H, T, S)
        if self.causal:
            masked = masked | (distance < 0)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scores = self.before(q @ k.transpose(2, 3), *operands).masked_fill(masked, -math.inf)
        return self.after(scores).to(v.dtype) @ v
