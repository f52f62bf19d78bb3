"""Text to calibrate and to measure on, and its way into blocks of tokens.

A text is a built-in kind (:mod:`sparsify.kinds`), a file (:mod:`sparsify.sources`), an iterable of
texts, or token ids as they are.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsify import sources
from sparsify.errors import BadInput
from sparsify.kinds import KINDS, SPLITS, Split, licences, python_docstrings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KINDS", "MOST_CHARACTERS", "SPLITS", "Split", "TokenText", "blocks", "check_text", "encode",
    "licences", "python_docstrings", "read_text", "texts_of", "token_blocks", "token_text",
]  # fmt: skip

# ---------------------------------------------------------------------------- the user's text


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        BadInput: missing, a folder, unreadable, empty, binary or in another encoding.
    """
    return "".join(sources.characters(path, KINDS))


def check_text(path: str | Path) -> None:
    """BadInput where the first texts of a file cannot be read; the rest is read when it is used."""
    for _ in itertools.islice(sources.file_texts(path, KINDS), 64):
        pass


def texts_of(
    source: str | Path | Iterable[str],
    split: Split,
    *,
    size: int | None = None,
    seed: int | None = 0,
) -> tuple[str, tuple[str, ...]]:
    """(name, texts) of a built-in kind, a file, or texts.

    Args:
        source: an iterable is read to its end, or until :data:`sources.MOST` characters.
        split: chooses the half of a built-in kind; a file is taken whole.
        size: characters wanted: of a file or an iterator that has more, a seeded sample is taken.
        seed: of that sample; None takes what comes first.
    """
    if isinstance(source, str) and source in KINDS:
        return f"{source} ({split} half)", KINDS[source](split)
    if isinstance(source, str | Path):
        return str(source), tuple(_sampled(sources.file_texts(source, KINDS), size, seed))
    if isinstance(source, Sequence):
        texts = tuple(source)
        name = f"{len(texts)} texts"
    else:
        texts = tuple(_sampled(map(_a_text, source), size, seed))
        name = f"{len(texts)} texts of a stream"
    if not texts or not all(isinstance(t, str) for t in texts) or not any(map(str.strip, texts)):
        raise BadInput("there is no text", help="a list of texts, a file, or token ids")
    return name, texts


def _a_text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadInput(
            f"a {type(value).__name__} is neither a text nor a tensor of token ids",
            help="an iterable gives texts, or tensors of token ids, or {'input_ids': ...}",
        )
    return value


def _sampled(texts: Iterable[str], size: int | None, seed: int | None) -> Iterable[str]:
    if size is None:
        return texts
    if seed is not None:
        return sources.sample(texts, size, seed)
    return _first(texts, size)


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        yield text
        size -= len(text)


# ---------------------------------------------------------------------------- tokens

MOST_CHARACTERS = 12  # of a token: how much text is kept to draw a number of tokens from


def blocks(
    tokenizer: Any, texts: Iterable[str], length: int, limit: int, seed: int | None = 0
) -> Tensor:
    """Token ids int64 (n, length) of the texts one after the other.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with ``encode(text) -> list of ids``.
        texts: any.
        length: tokens of a block; one shorter block where the texts do not fill one.
        limit: tokens in all, at most (rounded down to whole blocks).
        seed: shuffles the texts; None keeps their order.

    Raises:
        BadInput: fewer than two tokens.
    """
    return _blocks(tokenizer, texts, length, limit, seed)[0]


def _blocks(
    tokenizer: Any, texts: Iterable[str], length: int, limit: int, seed: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """:func:`blocks`, and of every block the number of the text that it starts in."""
    import torch

    pool = list(texts)
    if seed is not None:
        random.Random(seed).shuffle(pool)
    wanted = max(limit // length, 1) * length
    ids: list[int] = []
    ends: list[int] = []
    for text in pool:
        ids += encode(tokenizer, text + "\n\n")
        ends.append(len(ids))
        if len(ids) >= wanted:
            break
    if len(ids) < 2:
        raise BadInput("the text is too short", why=f"{len(ids)} tokens", help="give more text")
    length = min(length, len(ids))
    count = min(len(ids), wanted) // length
    starts = [block * length for block in range(count)]
    texts_at = tuple(bisect.bisect_right(ends, start) for start in starts)
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length), texts_at


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    if callable(tokenizer):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found = tokenizer.encode(text)
    return list(getattr(found, "ids", found))


@dataclasses.dataclass(frozen=True)
class TokenText:
    """Token ids of a text.

    Attributes:
        name: of the text.
        batches: token ids (batch, token); of a stream of tensors, to be gone through once.
        texts: of every row, the number of the text that it starts in; empty for token ids.
    """

    name: str
    batches: Iterable[Tensor]
    texts: tuple[int, ...] = ()


def token_text(
    source: str | Path | Iterable[str] | Iterable[Tensor],
    tokenizer: Any,
    *,
    length: int = 256,
    limit: int = 16384,
    seed: int | None = 0,
    split: Split = "calibration",
    batch: int = 4,
) -> TokenText:
    """Token ids of a text, of texts, or ids as they are.

    Args:
        source: a built-in kind, a file, an iterable of texts, or one of batches of ids (tensors, or
            mappings with ``input_ids``), which are taken as they are, one after the other.
        tokenizer: may be None where ids are given.
        length, limit, seed: as in :func:`blocks`.
        split: which half of a built-in text.
        batch: blocks in a batch.

    Raises:
        BadInput: text without a tokenizer, ids of a wrong kind, or as :func:`read_text`.
    """
    first: Any = None
    if not isinstance(source, str | Path):
        first, source = _peek(source)
    if _is_ids(first):
        return TokenText("token ids", map(_ids, cast("Iterable[Any]", source)))
    name, texts = texts_of(source, split, size=limit * MOST_CHARACTERS, seed=seed)  # type: ignore[arg-type]
    if tokenizer is None:
        raise BadInput(
            "this model comes without a tokenizer, so text cannot be used",
            help="pass tokenizer=..., or batches of token ids instead of text",
        )
    # A sample is in random order, and a smaller one is the beginning of a larger one. Shuffled
    # again, what search measures on would be among what routers were fitted on.
    found, at = _blocks(tokenizer, texts, length, limit, None if _sampled_from(source) else seed)
    return TokenText(name, list(found.split(batch)), at)


def _sampled_from(source: Any) -> bool:
    """Whether :func:`texts_of` takes a sample of it: of a file or a stream."""
    if isinstance(source, str):
        return source not in KINDS
    return not isinstance(source, Sequence)


def _peek(source: Any) -> tuple[Any, Any]:
    """(the first item, the source, whole); a lone tensor is a batch by itself."""
    if _is_ids(source):
        return source, [source]
    if isinstance(source, Sequence):
        return (source[0] if source else None), source
    stream = iter(source)
    first = next(stream, None)
    return first, itertools.chain([] if first is None else [first], stream)


def _is_ids(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or (isinstance(value, Mapping) and "input_ids" in value)


def token_blocks(
    source: str | Path | Iterable[str] | Iterable[Tensor],
    tokenizer: Any,
    *,
    length: int = 256,
    limit: int = 16384,
    seed: int | None = 0,
    split: Split = "calibration",
    batch: int = 4,
) -> tuple[str, list[Tensor]]:
    """(name of the text, batches of token ids (batch, token)); as :func:`token_text`."""
    found = token_text(
        source, tokenizer, length=length, limit=limit, seed=seed, split=split, batch=batch
    )
    batches = list(found.batches)
    if not batches:
        raise BadInput("there are no token ids", help="batches of token ids (batch, token)")
    return found.name, batches


def _ids(value: Any) -> Tensor:
    import torch

    found = value["input_ids"] if isinstance(value, Mapping) and "input_ids" in value else value
    if not isinstance(found, torch.Tensor):
        raise BadInput(f"a {type(value).__name__} is no tensor of token ids")
    if isinstance(value, Mapping) and not _unpadded(value.get("attention_mask")):
        raise BadInput(
            "token ids with padding cannot be used here",
            help="sequences of one length in a batch, or texts",
        )
    if found.is_floating_point() or found.is_complex() or found.dim() not in (1, 2):
        shape = tuple(found.shape)
        raise BadInput(f"token ids are integers (batch, token), not {found.dtype} {shape}")
    if not found.numel():
        raise BadInput("a batch of token ids is empty")
    return found.long().view(-1, found.shape[-1])


def _unpadded(mask: Any) -> bool:
    return mask is None or bool((mask != 0).all())
