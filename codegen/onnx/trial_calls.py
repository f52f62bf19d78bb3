"""The calls on which a file is held against its model, and what counts of their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.runtime.calling import CausalCall
from sparsify.runtime.model import SparseModel


def counted(model: SparseModel, flat: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs without what nobody reads: a language model's at padding.

    A query at padding sees no key, and what attention gives then is each implementation's own.
    """
    call = model.call_spec
    if not isinstance(call, CausalCall) or not call.masked:
        return list(outputs)
    real = flat[1].bool()
    logits, *cache = outputs
    tokens = real[:, real.shape[1] - logits.shape[1] :]
    return [logits[tokens], *(entry.movedim(2, 1)[real] for entry in cache)]


def without_padding(model: SparseModel, flat: Sequence[Tensor], selection: Tensor) -> Tensor:
    """Of a selection (B, T, ...), (B, H, T, N) or (B * T, R) what is not at a language model's
    padding."""
    call = model.call_spec
    if not isinstance(call, CausalCall) or not call.masked:
        return selection
    batch, tokens = flat[0].shape
    real = flat[1][:, flat[1].shape[1] - tokens :].bool()
    if selection.shape[:2] == (batch, tokens):
        return selection[real]
    if selection.dim() == 4 and selection.shape[::2] == (batch, tokens):
        return selection.movedim(2, 1)[real]
    if len(selection) == batch * tokens:
        return selection[real.flatten()]
    return selection


def cases(model: SparseModel) -> list[tuple[str, list[Tensor]]]:
    """(name, flat inputs): the example, and other sizes where the graph is open."""
    call = model.call_spec
    found = [("example", list(model.example))]
    free = bool(call.slots) and all(size is None for size in call.slots[0].shape)
    if not isinstance(call, CausalCall):
        batch = model.example[0].shape[0] if model.example and model.example[0].dim() else 0
        open_batch = [bool(s.shape) and s.shape[0] is None for s in call.slots]
        same = [t.dim() > 0 and t.shape[0] == batch for t in model.example]
        if batch > 1 and open_batch and all(o == s for o, s in zip(open_batch, same, strict=True)):
            found.append(("one sample", [t[:1] for t in model.example]))
        return found
    if not free:
        return found
    ids = _ids(call, batch=3, tokens=9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    dtype = model.dtype
    found.append(("prefill", call.inputs(ids[:1], dtype=dtype)))
    found.append(("batch", call.inputs(ids, dtype=dtype)))
    if call.masked:
        found.append(("left padding", call.inputs(ids, mask, dtype=dtype)))
    if call.layers:
        with torch.no_grad():
            _, *cache = model.graph(*call.inputs(ids, mask if call.masked else None, dtype=dtype))
        past = list(zip(cache[::2], cache[1::2], strict=True))
        longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1) if call.masked else None
        found.append(("decode", call.inputs(ids[:, :1], longer, None, past)))
    return found


def _ids(call: CausalCall, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, max(call.vocabulary - 1, 4), (batch, tokens), generator=generator)
