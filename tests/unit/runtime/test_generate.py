"""Generation with torch alone: greedy equals the uncached loop; sampling keeps its limits."""

from __future__ import annotations

import pytest
import torch

from sparsify.errors import BadInput, NotCaptured
from sparsify.runtime.generate import generate
from tests.unit.runtime.small import alone, causal, routed


def test_greedy_equals_the_uncached_loop() -> None:
    model, ids = causal(), torch.randint(0, 20, (3, 4))
    text = generate(model, ids, max_new_tokens=6)
    assert torch.equal(text, alone(model, ids, 6))
    assert torch.equal(model.generate(ids, max_new_tokens=6), text)
    assert torch.equal(generate(model, ids, max_new_tokens=0), ids)


def test_left_padding_does_not_change_the_text() -> None:
    model, ids = causal(), torch.randint(0, 20, (1, 4))
    padded = torch.cat([torch.full((1, 3), 7), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    text = generate(model, padded, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(text[:, 3:], generate(model, ids, max_new_tokens=5))
    with pytest.raises(BadInput, match="on the left"):
        generate(model, padded, attention_mask=mask.flip(1))


def test_rows_end_at_end_tokens_and_are_padded() -> None:
    model, ids = causal(), torch.randint(0, 20, (4, 4))
    free = generate(model, ids, max_new_tokens=8)[:, 4:]
    end = int(free[0, 2])
    text = generate(model, ids, max_new_tokens=8, eos_token_id=[end, 99], pad_token_id=19)[:, 4:]
    for row, whole in zip(text.tolist(), free.tolist(), strict=True):
        stop = whole.index(end) + 1 if end in whole else len(whole)
        assert row[:stop] == whole[:stop][: len(row)]
        assert set(row[stop:]) <= {19}


def test_sampling_is_repeatable_and_leaves_the_global_state() -> None:
    model, ids = causal(), torch.randint(0, 20, (2, 3))
    state = torch.random.get_rng_state()
    one = generate(model, ids, temperature=1.0, seed=3)
    two = generate(model, ids, temperature=1.0, seed=3)
    other = generate(model, ids, temperature=1.0, seed=4)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_candidate_is_greedy() -> None:
    model, ids = causal(), torch.randint(0, 20, (2, 3))
    greedy = generate(model, ids)
    assert torch.equal(generate(model, ids, temperature=2.0, top_k=1, seed=0), greedy)
    assert torch.equal(generate(model, ids, temperature=2.0, top_p=1e-6, seed=0), greedy)


def test_tokens_are_reported_as_they_come() -> None:
    seen: list[torch.Tensor] = []
    text = generate(causal(), torch.ones(2, 3, dtype=torch.int64), on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), text[:, 3:])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"max_new_tokens": -1},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        generate(causal(), torch.ones(1, 3, dtype=torch.int64), **options)


def test_other_models_cannot_generate() -> None:
    with pytest.raises(NotCaptured, match="not a language model"):
        routed().generate(torch.ones(1, 3, dtype=torch.int64))
