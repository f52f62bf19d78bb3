"""Generation that needs only torch: greedy or sampled, batched, left padded, cached.

Equals transformers' greedy search token for token. Where transformers is installed, models that
came from it use its own ``generate`` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput, NotCaptured
from sparsify.runtime.calling import CausalCall

if TYPE_CHECKING:
    from sparsify.runtime.model import SparseModel


@torch.no_grad()
def generate(
    model: SparseModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    on_token: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """Continue ``input_ids`` (B, T); returns (B, T + new).

    Args:
        attention_mask: (B, T), 0 at padding, which must be on the left.
        temperature: 0 = greedy.
        top_k: sample among the k likeliest tokens; 0 = all.
        top_p: sample among the likeliest tokens that together have this probability.
        eos_token_id: a row ends at any of these; a finished row is filled with ``pad_token_id``
            (default: the first end token).
        seed: makes sampling repeatable without touching torch's global state.
        on_token: called with each new column (B,).
    """
    if not isinstance(model.call_spec, CausalCall):
        raise NotCaptured(
            f"{model.call_spec.model} is not a language model: there is nothing to generate"
        )
    _check(max_new_tokens, temperature, top_k, top_p)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if bool((mask[:, -1:] == 0).any()):
        raise BadInput("padding must be on the left", help="tokenizer.padding_side = 'left'")
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    pad = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    source = None
    if seed is not None:
        source = torch.Generator(device=input_ids.device).manual_seed(seed)
    text, new = input_ids, input_ids
    cache: list[tuple[Tensor, Tensor]] | None = None
    running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    cached = bool(model.call_spec.layers)
    # As transformers does whatever the model's own default: positions count unmasked tokens.
    counted = model.call_spec.positions is not None
    for _ in range(max_new_tokens):
        positions = None
        if counted:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        logits, grown = model.run_causal(new, mask, positions, cache, keep=1)
        cache = grown if cached else None
        token = _pick(logits[:, -1].float(), temperature, top_k, top_p, source)
        token = torch.where(running, token, torch.full_like(token, pad))
        if on_token is not None:
            on_token(token)
        text = torch.cat([text, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        for end in ends:
            running = running & (token != end)
        if ends and not bool(running.any()):
            break
        new = token[:, None] if cached else text
    return text


def _pick(
    logits: Tensor, temperature: float, top_k: int, top_p: float, source: torch.Generator | None
) -> Tensor:
    """One token per row of ``logits`` (B, V)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        chances = ordered.softmax(-1)
        # A token goes when those before it already have probability top_p; the first one stays.
        gone = chances.cumsum(-1) - chances >= top_p
        logits = logits.masked_fill(gone.scatter(-1, order, gone), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=source)[:, 0]


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    wrong = {
        f"max_new_tokens={max_new_tokens}": max_new_tokens < 0,
        f"temperature={temperature}": not temperature >= 0,
        f"top_k={top_k}": top_k < 0,
        f"top_p={top_p}": not 0 < top_p <= 1,
    }
    for text, bad in wrong.items():
        if bad:
            raise BadInput(
                f"cannot generate with {text}",
                help="max_new_tokens, temperature and top_k are >= 0; 0 < top_p <= 1",
            )
