"""Batches of unequal texts: every row is what it is alone, padded left or right."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from tests.contract.zoo_captures import captured

MODELS = ("llama", "gpt2")
BUDGETS = (0.5, 1.0)
LENGTHS = (9, 4, 7)


@functools.cache
def compiled(name: str) -> Any:
    return sparsify.compile(captured(name), "ffn-moe{shared=1},attn-moh", reproducer=None)


@functools.cache
def texts() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(3, 120, (1, n), generator=generator) for n in LENGTHS)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) of all texts, padded with the pad token 0 on one side."""
    most = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), most, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts()):
        n = text.shape[1]
        place = slice(0, n) if side == "right" else slice(most - n, most)
        ids[row, place], mask[row, place] = text[0], 1
    return ids, mask


@pytest.fixture(params=BUDGETS, ids="{:g} active".format)
def active(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, active: float) -> Any:
    made = compiled(request.param)
    made.set_active(active)
    yield made
    made.set_active(1.0)


def close(found: Tensor, alone: Tensor) -> None:
    assert found.shape == alone.shape
    scale = float(alone.abs().max())
    assert float((found - alone).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_each_row_of_a_batch_is_what_it_is_alone(model: Any, side: str) -> None:
    ids, mask = padded(side)
    # as generate() does: positions count the tokens that are there
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, text in enumerate(texts()):
        close(batch[row][mask[row].bool()], model(input_ids=text).logits[0])


@torch.no_grad()
def test_right_padding_needs_no_positions(model: Any) -> None:
    ids, mask = padded("right")
    batch = model(input_ids=ids, attention_mask=mask).logits
    for row, text in enumerate(texts()):
        close(batch[row][mask[row].bool()], model(input_ids=text).logits[0])


@torch.no_grad()
def test_what_stands_at_padding_changes_nothing(model: Any) -> None:
    ids, mask = padded("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    other = torch.where(mask.bool(), ids, 77)
    one = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    two = model(input_ids=other, attention_mask=mask, position_ids=positions).logits
    close(two[mask.bool()], one[mask.bool()])


def test_a_left_padded_batch_generates_what_each_row_does_alone(model: Any) -> None:
    ids, mask = padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, text in enumerate(texts()):
        alone = model.generate(text, attention_mask=torch.ones_like(text), **options)
        assert batch[row].tolist() == alone[0, text.shape[1] :].tolist()


def test_the_dense_model_generates_the_same_at_full_budget() -> None:
    model = compiled("llama")
    dense = captured("llama").source
    ids, mask = padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(found, dense.generate(ids, attention_mask=mask, **options))
