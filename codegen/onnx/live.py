"""How many experts tokens use, counted: while a language model writes.

A budget says how many are live on average over the calibration text, layer by layer, as long as the
other layers are dense. With all of them at their budgets, and on text that the model itself writes
when it decodes, it is fewer: SmolLM2-135M with half of its 64 experts a layer (by its budgets 32.3)
uses 25.8 on prose, 29.7 on Python and 26.5 on what it writes. A form's time follows these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.runtime.calling import CausalCall
from sparsify.runtime.counters import counters, realised, reset
from sparsify.runtime.model import SparseModel

TEXTS, TOKENS = 16, 24  # written from one first token, which does not count (four texts: 26 to 28)


def shares(model: SparseModel) -> dict[str, float]:
    """Module path -> the share of its units that is live for a token, at the present budget.

    Empty where the model is none that writes text of any length. Counters are left as they were.
    """
    call = model.call_spec
    if not isinstance(call, CausalCall) or any(size is not None for size in call.slots[0].shape):
        return {}
    with torch.no_grad(), _counters_kept(model):
        _write(model, call)
        return realised(model)


def _write(model: SparseModel, call: CausalCall) -> None:
    """Sample the same texts every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((TEXTS, 1), _first(model), dtype=torch.int64)
    past: list[tuple[Tensor, Tensor]] | None = None
    for _ in range(TOKENS):
        new = ids[:, -1:] if call.layers else ids
        if ids.shape[1] == 2:
            reset(model)
        logits, *cache = model.graph(*call.inputs(new, None, None, past, dtype=model.dtype))
        past = list(zip(cache[::2], cache[1::2], strict=True)) if call.layers else None
        likely = logits[:, -1].float().nan_to_num(0.0).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], 1)


def _first(model: SparseModel) -> int:
    """The token that begins a text; where the model names none, the example's first."""
    config: Any = getattr(model, "config", None)
    named = getattr(config, "bos_token_id", None)
    return named if isinstance(named, int) else int(model.example[0].flatten()[0])


@contextlib.contextmanager
def _counters_kept(model: SparseModel) -> Iterator[None]:
    """Zero inside; afterwards as before, in place (kernels add to them where they lie)."""
    held = [(counter, list(counter.numbers)) for _, counter in counters(model)]
    reset(model)
    try:
        yield
    finally:
        for counter, numbers in held:
            for place, number in enumerate(numbers):
                counter.numbers[place] = number
