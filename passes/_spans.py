"""Which heads need long spans: attention mass within each span, and the units ordered by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.core import Refused
from sparsify.errors import BadInput
from sparsify.regions import Attention
from sparsify.runtime.budget import error_table
from sparsify.runtime.spans import SpanAttend, split_softmax

ROWS = 8  # sequences that are measured


def check_softmax(attention: Attention) -> None:
    """Refused where the scores are more than elementwise steps around one softmax."""
    try:
        split_softmax(attention.score)
    except BadInput as error:
        raise Refused(str(error)) from None


def fit(module: SpanAttend, q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> None:
    """Order the units of ``module`` by the attention mass that they keep; fill the error table."""
    kept = mass(module, q[:ROWS], k[:ROWS], *[o[:ROWS] if o.dim() == 4 else o for o in operands])
    order, gains = ranked(kept)
    module.order = order.to(module.order.device)
    module.budget.errors = error_table(gains.flip(0)).to(module.order.device)


def mass(module: SpanAttend, q: Tensor, k: Tensor, *operands: Tensor) -> Tensor:
    """(H, G + 1): mean share of a head's attention within its span of 0, ..., G units."""
    tokens, keys = q.shape[2], k.shape[2]
    each = k.repeat_interleave(module.heads // module.kv_heads, dim=1)
    scores = module.before(q.float() @ each.float().transpose(2, 3), *operands)
    distance = torch.arange(tokens).unsqueeze(1) - torch.arange(keys)
    distance = (distance + (0 if module.causal else keys - tokens)).to(q.device)
    if module.causal:
        scores = scores.masked_fill(distance < 0, -math.inf)
    share = module.after(scores).double().mean(0)  # (H, T, S)
    sink = torch.arange(keys, device=q.device) < module.sinks
    found = []
    for units in range(module.steps):
        span = module.alpha + math.ceil(units / module.steps * keys)
        near = (distance.abs() < span) | sink
        found.append((share * near).sum((1, 2)) / tokens)
    return torch.stack([*found, share.sum((1, 2)) / tokens], dim=1)


def ranked(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Heads of all units, the most useful first, and what each unit keeps (both (H * G,)).

    Greedy by the best mean gain over a head's next units (its concave envelope), so a step that
    pays only together with the next one is taken with it.
    """
    rows = kept.tolist()
    taken = [0] * len(rows)
    order: list[int] = []
    gains: list[float] = []
    while len(order) < len(rows) * (len(rows[0]) - 1):
        best = (-1.0, 0, 0)
        for head, row in enumerate(rows):
            for after in range(taken[head] + 1, len(row)):
                gain = (row[after] - row[taken[head]]) / (after - taken[head])
                if gain > best[0]:
                    best = (gain, head, after)
        gain, head, after = best
        order += [head] * (after - taken[head])
        gains += [max(gain, 0.0)] * (after - taken[head])
        taken[head] = after
    return torch.tensor(order), torch.tensor(gains, dtype=torch.float64)
