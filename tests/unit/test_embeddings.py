"""Encoders: sentences without padding, neighbours against plain sorting, calibration on text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsify
from sparsify import api, embeddings, sentences
from sparsify.errors import BadInput
from sparsify.report import Report
from tests.contract.zoo_captures import captured


class Letters:
    """A tokenizer of letters with a token before and after, for the zoo's vocabulary."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        most = options.get("max_length", 10**9) - 2
        body = [5 + ord(c) % 80 for c in text][:most]
        return {"input_ids": body if options.get("add_special_tokens") is False else [1, *body, 2]}


TEXT = """This is the first sentence of a text. Here comes another one, somewhat longer!

    code = {"not": a_sentence}
    ------------------------------

* An item of a list is taken
* and so is the next one here

Short. Is this a question that counts? 1234567890 1234567890 1234567890 1234567890"""


def test_sentences_are_prose() -> None:
    assert list(sentences.sentences_of(TEXT)) == [
        "This is the first sentence of a text.", "Here comes another one, somewhat longer!",
        "* An item of a list is taken", "* and so is the next one here",
        "Is this a question that counts?",
    ]  # fmt: skip


def test_batches_have_no_padding() -> None:
    found = sentences.sentences(
        "docstrings", Letters(), ("input_ids", "attention_mask"), limit=3000, most=40, batch=4
    )
    assert found.count == sum(len(b["input_ids"]) for b in found.batches) == len(found.texts)
    assert 2900 < found.tokens < 3100
    lengths = [b["input_ids"].shape[1] for b in found.batches]
    assert lengths == sorted(lengths) and lengths[-1] == 40
    for batch in found.batches:
        assert 1 <= len(batch["input_ids"]) <= 4
        assert batch["attention_mask"].shape == batch["input_ids"].shape
        assert (batch["input_ids"][:, 0] == 1).all() and set(batch) == {
            "input_ids", "attention_mask",
        }  # fmt: skip
    again = sentences.sentences("docstrings", Letters(), ("input_ids",), limit=3000, most=40)
    assert again.tokens == found.tokens
    alike = found.alike(400)
    assert alike.shape[0] == 400 // alike.shape[1]
    assert (alike[:, -1] == 2).all()


def test_too_little_text() -> None:
    with pytest.raises(BadInput, match="too short"):
        sentences.sentences(["One sentence only stands here."], Letters(), (), limit=100)
    with pytest.raises(BadInput, match="without a tokenizer"):
        sentences.sentences("docstrings", None, (), limit=100)


def test_neighbours_are_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_AT_ONCE", 7)
    rows = torch.nn.functional.normalize(
        torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    found = embeddings.nearest(rows, 3)
    for i in range(20):
        near = sorted((j for j in range(20) if j != i), key=lambda j: -float(rows[i] @ rows[j]))
        assert found[i].tolist() == near[:3]
    assert embeddings.shared(found, found).tolist() == [1.0] * 20
    mine, theirs = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[4, 9, 8, 2]])
    assert embeddings.shared(mine, theirs).tolist() == [0.5]


def test_vectors_in_outputs_of_every_kind() -> None:
    from types import SimpleNamespace

    vectors = torch.randn(2, 3, 4)
    outputs: tuple[Any, ...] = (
        vectors, (vectors,), {"last_hidden_state": vectors},
        SimpleNamespace(last_hidden_state=vectors),
    )  # fmt: skip
    for output in outputs:
        assert embeddings.vectors_of(output) is vectors
    with pytest.raises(BadInput, match="no token vectors"):
        embeddings.vectors_of(SimpleNamespace(logits=vectors))
    mean, first = (embeddings.embedded(vectors, how) for how in embeddings.POOLINGS)
    assert torch.allclose(mean.norm(dim=-1), torch.ones(2))
    assert torch.allclose(first, torch.nn.functional.normalize(vectors[:, 0], dim=-1))


def test_an_encoder_is_calibrated_and_measured_on_sentences() -> None:
    model = sparsify.compile(
        captured("bert"), "ffn-moe", calibration="docstrings", tokenizer=Letters(), reproducer=None
    )
    report = model.report
    assert isinstance(report, Report)
    assert str(report.calibration).startswith("docstrings (calibration half), 8")
    found = api.evaluate(
        model, "docstrings", active=(1.0, 0.5), tokens=1200, top=3, resamples=50
    ).embeddings
    assert found is not None
    dense, full, half, static, rival = found.rows
    assert (dense.cosine, dense.neighbours) == (1, 1)
    assert full.cosine == pytest.approx(1, abs=1e-5)
    assert 0 < half.cosine < 1 and half.worst <= half.cosine
    assert half.cosine_within is not None
    assert (static.model, rival.model) == ("static pruning", "TEAL")
    assert rival.flops == pytest.approx(half.flops, abs=0.05)
    assert isinstance(model.report, Report) and model.report.embeddings == found
    assert "embeddings of docstrings" in model.report.golden()
    with pytest.raises(BadInput, match="nearest others"):
        api.evaluate(model, "docstrings", tokens=200, top=500)
    with pytest.raises(BadInput, match="only language models answer"):
        api.evaluate(model, choices="q.jsonl")


def test_models_without_text_are_refused() -> None:
    model = sparsify.compile(captured("vit"), "ffn-moe", reproducer=None)
    with pytest.raises(BadInput, match="language models and encoders"):
        api.evaluate(model, "docstrings")
    with pytest.raises(BadInput, match="does not read text"):
        sparsify.compile(
            captured("vit"), "ffn-moe", calibration="docstrings", tokenizer=Letters(),
            reproducer=None,
        )  # fmt: skip
