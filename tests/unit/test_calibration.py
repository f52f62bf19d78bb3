"""Calibration from every source, as one stream, the same for one seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify import sources
from sparsify.errors import BadInput
from sparsify.report import Report
from tests.contract.zoo_captures import captured
from tests.unit.test_embeddings import Letters


def compiled(source: Any, model: str = "llama", **options: Any) -> Any:
    options = {"tokenizer": Letters(), "verify": "off", "reproducer": None, **options}
    return sparsify.compile(captured(model), "ffn-moe", calibration=source, **options)


def weights(model: Any) -> list[Tensor]:
    return [p for n, p in sorted(model.named_parameters()) if "router" in n]


def fitted(model: Any) -> str:
    assert isinstance(model.report, Report)
    return str(model.report.calibration)


def batches(count: int = 6) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randint(0, 90, (2, 24), generator=g)


def test_streams_are_read_once_and_give_what_lists_give() -> None:
    streamed, listed = compiled(batches()), compiled(list(batches()))
    mapped = compiled({"input_ids": ids} for ids in batches())
    assert fitted(streamed) == fitted(listed) == "token ids, 288 tokens"
    assert fitted(mapped) == "batches, 288 tokens"
    for others in (listed, mapped):
        for a, b in zip(weights(streamed), weights(others), strict=True):
            assert torch.equal(a, b)


def test_texts_from_any_iterable_and_file(tmp_path: Path) -> None:
    texts = [f"This is text number {i}, and it goes on for a while. " * 6 for i in range(40)]
    plain, lines = tmp_path / "t.txt", tmp_path / "t.jsonl"
    plain.write_text("\n\n".join(texts))
    records = [json.dumps(t) if i % 2 else json.dumps({"text": t}) for i, t in enumerate(texts)]
    lines.write_text("\n".join(records) + "\n\n")
    assert list(sources.file_texts(lines)) == texts
    for source in (texts, iter(texts), plain, str(lines)):
        assert fitted(compiled(source)).endswith(", 8192 tokens")


def test_one_seed_one_result(tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(json.dumps(f"text {i} " * 200) for i in range(200)))
    one, two, other = (compiled(lines, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('"fine"\n{"text": 3}\n', "line 2: an object with text"),
        ('"fine"\n\n{"title": "t"}\n', "line 3: an object with title"),
        ('"fine"\n{"text": "x"\n', "line 2"),
        ("3\n", "line 1: a int"),
        ("\n\n", "is empty"),
        ('""\n{"text": " "}\n', "no line has any text"),
        ('"a few words"\n', "too short to calibrate on"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(content)
    with pytest.raises(BadInput) as caught:
        compiled(file)
    assert says in str(caught.value)


@pytest.mark.parametrize("source", [iter(()), [], iter([torch.zeros(2, 0, dtype=torch.long)])])
def test_nothing_to_calibrate_on(source: Any) -> None:
    with pytest.raises(BadInput):
        compiled(source)


def test_padded_batches_count_their_tokens_only() -> None:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 20:] = 0
    found = compiled(
        [{"input_ids": ids, "attention_mask": mask} for ids in batches(3)], model="bert"
    )
    assert fitted(found) == f"batches, {3 * 44} tokens"
    with pytest.raises(BadInput, match="is no batch"):
        compiled([{"input_ids": next(batches())}, 3])


def test_a_model_without_text_takes_batches() -> None:
    capture = captured("vit")
    name = next(iter(capture.call.captured))
    found = compiled([{name: capture.example[0]}], model="vit", tokenizer=None)
    assert fitted(found).startswith("batches, ")


# ---------------------------------------------------------------------------- streams of text


def test_a_sample_is_bounded_uniform_and_repeatable() -> None:
    texts = [f"{i:04d}" * 25 for i in range(1000)]
    one = sources.sample(iter(texts), 2000, 0)
    assert 2000 <= sum(map(len, one)) < 2100
    assert one == sources.sample(iter(texts), 2000, 0)
    assert one != sources.sample(iter(texts), 2000, 1)
    counts = [0, 0]
    for seed in range(50):
        for text in sources.sample(iter(texts), 2000, seed):
            counts[int(text[:4]) >= 500] += 1
    assert abs(counts[0] - counts[1]) < 200  # of 1,000
    assert sorted(sources.sample(iter(texts[:5]), 10**6, 0)) == sorted(texts[:5])


def test_endless_streams_end() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again and again " * 100

    found = sources.sample(endless(), 5000, 0, most=10**6)
    assert 5000 <= sum(map(len, found)) < 7000


def test_files_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 5)
    file = tmp_path / "t.txt"
    text = "\n\n".join(f"Grüße, {i} mal: " + "ä" * i for i in range(30))
    file.write_text("\ufeff" + text, encoding="utf-8")
    assert "".join(sources.characters(file)) == text
    assert "\n\n".join(sources.pieces(sources.characters(file), 400)) == text
    file.write_bytes("über\nzwei\nd".encode() + b"\xff\nvier")
    with pytest.raises(BadInput, match="line 3: byte 0xff"):
        list(sources.characters(file))
    file.write_bytes(b"cut \xc3")
    with pytest.raises(BadInput, match="line 1: byte 0xc3"):
        list(sources.characters(file))
