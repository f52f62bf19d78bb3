"""Text to calibrate and to measure on, without a network, and its way into blocks of tokens.

Four kinds are on every machine: Python's own docstrings; the READMEs and licences of installed
packages; the language reference, which the interactive help reads; and the standard library's code
without its docstrings and comments. Each is split by module (package, topic) into a calibration
half and a held-out half that share no paragraph, so that nothing is measured on what it was fitted
on; a module's docstrings and its code are in the same half.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from sparsify import sources
from sparsify.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["calibration", "held-out"]
SPLITS: tuple[Split, ...] = get_args(Split)
CHARACTERS = 400_000  # of each half: about 100,000 tokens
_SHORTEST = 300  # characters of a text worth keeping

# ---------------------------------------------------------------------------- texts on this machine


def python_docstrings(split: Split) -> tuple[str, ...]:
    """Long docstrings of the standard library; the halves share no module and no paragraph."""
    return _docstrings()[split]


def licences(split: Split) -> tuple[str, ...]:
    """READMEs and licences of the installed packages; the halves share no package, no paragraph."""
    return _licences()[split]


def reference(split: Split) -> tuple[str, ...]:
    """Python's language reference; the halves share no topic and no paragraph."""
    return _reference()[split]


def code(split: Split) -> tuple[str, ...]:
    """Code of the standard library, without docstrings and comments; halves as of docstrings."""
    return _code()[split]


KINDS: dict[str, Callable[[Split], tuple[str, ...]]] = {
    "docstrings": python_docstrings,
    "licences": licences,
    "reference": reference,
    "code": code,
}

_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def _docstrings() -> dict[Split, tuple[str, ...]]:
    def texts(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, _DEFINITIONS) and (text := ast.get_docstring(node)):
                yield text

    return _modules(texts)


@functools.cache
def _code() -> dict[Split, tuple[str, ...]]:
    def texts(tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, _DEFINITIONS) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        for statement in tree.body:  # printed one by one, so that a blank line ends a paragraph
            if isinstance(statement, _DEFINITIONS):
                yield ast.unparse(statement)

    return _modules(texts)


def _modules(texts: Callable[[ast.Module], Iterator[str]]) -> dict[Split, tuple[str, ...]]:
    """Halves of what ``texts`` reads in the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [p.relative_to(root) for p in root.rglob("*.py")]
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    modules = [m for m in modules if not skipped & set(m.parts)]

    def read(module: Path) -> Iterator[str]:
        try:
            tree = ast.parse((root / module).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return
        yield from texts(tree)

    return _halves({str(m): (m.parts[0], functools.partial(read, m)) for m in modules})


@functools.cache
def _reference() -> dict[Split, tuple[str, ...]]:
    topics: Mapping[str, str] = {}
    with contextlib.suppress(ImportError):  # some distributions leave it out
        topics = importlib.import_module("pydoc_data.topics").topics
    return _halves({name: (name, functools.partial(iter, (t,))) for name, t in topics.items()})


@functools.cache
def _licences() -> dict[Split, tuple[str, ...]]:
    def texts(dist: importlib.metadata.Distribution) -> Iterator[str]:
        description = dist.metadata.get_payload() if dist.metadata else ""  # type: ignore[attr-defined]
        if isinstance(description, str) and description.strip():
            yield description
        for file in dist.files or ():
            if re.search(r"(?i)(licen[cs]e|notice|copying)", file.name) and file.suffix != ".py":
                try:
                    yield Path(str(file.locate())).read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue

    found = {d.name: d for d in importlib.metadata.distributions() if d.name}
    return _halves({n: (n, functools.partial(texts, d)) for n, d in found.items()})


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _halves(
    sources: dict[str, tuple[str, Callable[[], Iterator[str]]]],
) -> dict[Split, tuple[str, ...]]:
    """Texts of each half, in an order that depends on names only.

    Args:
        sources: name -> (what decides the half, how to read its texts). A paragraph that came
            before, in either half, is dropped.
    """
    halves: dict[Split, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    seen: set[str] = set()
    for name in sorted(sources, key=_hash):
        decides, read = sources[name]
        split = SPLITS[_hash(decides) % 2]
        if sizes[split] >= CHARACTERS:
            continue
        for text in read():
            kept = []
            for paragraph in re.split(r"\n\s*\n", text.strip()):
                words = re.sub(r"\W+", " ", paragraph).strip().lower()
                if words and words not in seen:
                    seen.add(words)
                    kept.append(paragraph)
            whole = "\n\n".join(kept)
            if len(whole) >= _SHORTEST and sizes[split] < CHARACTERS:
                halves[split].append(whole[: CHARACTERS // 8])
                sizes[split] += len(halves[split][-1])
    return {split: tuple(texts) for split, texts in halves.items()}


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
    found, at = _blocks(tokenizer, texts, length, limit, seed)
    return TokenText(name, list(found.split(batch)), at)


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
