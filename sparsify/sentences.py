"""Sentences of a text as an encoder reads them: with its special tokens, and without padding.

Sentences of as many tokens share a batch, so nothing is padded, nothing is masked, and what is
counted are tokens of the text.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.corpus import MOST_CHARACTERS, Split, texts_of
from sparsify.errors import BadInput
from sparsify.runtime.calling import Slot

Batch = dict[str, Tensor]  # argument -> (batch, token)
LONGEST = 128  # tokens of a sentence; the rest is cut
_SHORTEST, _MOST = 20, 600  # characters
_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])|\n\s*\n|\n\s*(?=[*•-]\s)")


def sentences_of(text: str) -> Iterator[str]:
    """Sentences that are mostly letters; code, tables and rulers are left out."""
    for part in _END.split(text):
        sentence = " ".join(part.split())
        if not _SHORTEST <= len(sentence) <= _MOST:
            continue
        if sum(c.isalpha() or c == " " for c in sentence) >= 0.8 * len(sentence):
            yield sentence


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Encoded sentences.

    Attributes:
        name: of the text.
        batches: sentences of one length each, shortest first.
        texts: of every row, the number of the text that it is from.
    """

    name: str
    batches: tuple[Batch, ...]
    texts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of all sentences, special ones too."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @property
    def count(self) -> int:
        """How many sentences there are."""
        return len(self.texts)

    def alike(self, tokens: int) -> Tensor:
        """(n, T) ids of sentences of at least the median length, cut to it; about ``tokens``."""
        rows = [row for batch in self.batches for row in batch["input_ids"].tolist()]
        length = sorted(map(len, rows))[len(rows) // 2]
        cut = [[*row[: length - 1], row[-1]] for row in rows if len(row) >= length]
        return torch.tensor(cut[: max(tokens // length, 1)], dtype=torch.int64)


def sentences(
    source: str | Path | Iterable[str],
    tokenizer: Any,
    arguments: Iterable[str],
    *,
    limit: int,
    seed: int = 0,
    split: Split = "calibration",
    most: int = LONGEST,
    batch: int = 16,
) -> Sentences:
    """Sentences of a text.

    Args:
        source: a built-in kind, a file, or texts.
        arguments: of the model; ``attention_mask`` and the like are made where they are among them.
        limit: tokens in all, at most.
        seed: of the sample, and of the order in which texts are taken.
        split: which half of a built-in text.
        most: tokens of a sentence.

    Raises:
        BadInput: no tokenizer, or fewer than two sentences; and as :func:`corpus.texts_of`.
    """
    if tokenizer is None:
        raise BadInput(
            "this model comes without a tokenizer, so text cannot be used",
            help="pass tokenizer=..., or batches of token ids instead of text",
        )
    name, texts = texts_of(source, split, size=limit * MOST_CHARACTERS, seed=seed)
    pool = list(texts)
    random.Random(seed).shuffle(pool)
    rows: list[tuple[list[int], int]] = []
    seen: set[str] = set()
    left = limit
    for number, text in enumerate(pool):
        for sentence in sentences_of(text):
            if left <= 0:
                break
            if sentence not in seen:
                seen.add(sentence)
                rows.append((_encoded(tokenizer, sentence, most), number))
                left -= len(rows[-1][0])
    if len(rows) < 2:
        raise BadInput(
            "the text is too short", why=f"it has {len(rows)} sentences", help="give more text"
        )
    rows.sort(key=lambda row: len(row[0]))
    return Sentences(name, tuple(_batches([r for r, _ in rows], arguments, batch)),
                     tuple(number for _, number in rows))  # fmt: skip


def _encoded(tokenizer: Any, text: str, most: int) -> list[int]:
    found = tokenizer(text, truncation=True, max_length=most, verbose=False)["input_ids"]
    return list(found)[:most]


def _batches(rows: list[list[int]], arguments: Iterable[str], size: int) -> Iterator[Batch]:
    names, start = list(arguments), 0
    for end in range(1, len(rows) + 1):
        full = end - start == size
        if full or end == len(rows) or len(rows[end]) != len(rows[start]):
            yield arguments_of(torch.tensor(rows[start:end], dtype=torch.int64), names)
            start = end


def arguments_of(ids: Tensor, names: Iterable[str]) -> Batch:
    """Ids without padding, and what a model of these arguments wants beside them."""
    makers = {
        "input_ids": lambda: ids,
        "attention_mask": lambda: torch.ones_like(ids),
        "token_type_ids": lambda: torch.zeros_like(ids),
    }
    return {name: makers[name]() for name in names if name in makers}


def reads_text(captured: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments takes token ids, and nothing else that text lacks."""
    tensors = {name for name, tree in captured.items() if tree.get("kind") == "tensor"}
    return "input_ids" in tensors <= {"input_ids", "attention_mask", "token_type_ids"}


def longest(slots: Iterable[Slot]) -> int:
    """Tokens of a sentence that a model with these inputs takes, LONGEST at most."""
    limits = [slot.limits[1] for slot in slots if len(slot.limits) > 1]
    return min([LONGEST, *(n for n in limits if n is not None)])
