"""Texts: halves that share nothing, clear errors for files, deterministic blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify import corpus
from sparsify.errors import BadInput


class Bytes:
    """One token per byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Callable:
    """The call of a Hugging Face tokenizer."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("kind", list(corpus.KINDS))
def test_halves_share_no_paragraph(kind: str) -> None:
    halves = [corpus.KINDS[kind](split) for split in corpus.SPLITS]
    paragraphs = [{p for text in half for p in text.split("\n\n")} for half in halves]
    assert not paragraphs[0] & paragraphs[1]
    for half in halves:
        assert sum(map(len, half)) > 50_000


def test_docstrings_are_stable_within_a_process() -> None:
    assert corpus.python_docstrings("held-out") is corpus.python_docstrings("held-out")


def test_read_text(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeffgrüße".encode())
    assert corpus.read_text(file) == "grüße"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such text file"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"PK\3\4\0\0", "is not text"),
        (b"first\nsecond \xe9\n", "is not UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "t.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=says) as caught:
        corpus.read_text(file)
    if says == "is not UTF-8":
        assert "line 2: byte 0xe9" in str(caught.value)
    with pytest.raises(BadInput, match="is a folder"):
        corpus.read_text(tmp_path)


@given(
    st.lists(st.text(alphabet="abc \n", max_size=40), min_size=1, max_size=8),
    st.integers(2, 20), st.integers(1, 100),
)  # fmt: skip
def test_blocks_are_the_text(texts: list[str], length: int, limit: int) -> None:
    found = corpus.blocks(Bytes(), texts, length, limit, seed=None)
    whole = "".join(t + "\n\n" for t in texts).encode()
    assert found.numel() <= max(limit, length)
    assert bytes(found.flatten().tolist()) == whole[: found.numel()]
    assert found.shape[1] == min(length, len(whole))


def test_blocks_are_shuffled_by_seed_and_repeatable() -> None:
    texts = [c * 10 for c in "abcdefgh"]
    one, two, other = (corpus.blocks(Callable(), texts, 12, 96, seed) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(BadInput, match="too short"):
        corpus.blocks(Bytes(), [], 8, 8)


def test_long_files_are_cut_into_pieces(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    paragraphs = [f"{i} " * 300 for i in range(40)]
    file.write_text("\n\n".join(paragraphs))
    name, texts = corpus.texts_of(file, "calibration")
    assert name == str(file)
    assert 2 < len(texts) < 40
    assert "\n\n".join(texts) == file.read_text()


def test_token_blocks_from_every_source(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("some words " * 50)
    options: dict[str, Any] = {"length": 16, "limit": 128}
    for source in (file, str(file), "docstrings", ["some words " * 50]):
        name, batches = corpus.token_blocks(source, Bytes(), **options)
        assert name
        assert [tuple(b.shape) for b in batches] == [(4, 16), (4, 16)]
    ids = torch.ones(3, 5, dtype=torch.int32)
    for given_ids in (ids, [ids], iter([ids])):
        name, batches = corpus.token_blocks(given_ids, None, **options)
        assert name == "token ids"
        assert [tuple(b.shape) for b in batches] == [(3, 5)]
    assert corpus.token_blocks([torch.ones(5, dtype=torch.long)], None)[1][0].shape == (1, 5)
    held = corpus.token_blocks("docstrings", Bytes(), split="held-out", **options)[1]
    assert not torch.equal(held[0], batches[0])


@pytest.mark.parametrize("source", [[], [""], [3], [torch.ones(2, 2)]])
def test_what_is_no_text(source: Any) -> None:
    with pytest.raises(BadInput):
        corpus.token_blocks(source, Bytes())


def test_text_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(BadInput, match="without a tokenizer"):
        corpus.token_blocks(["text"], None)
