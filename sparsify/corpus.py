"""Text to calibrate and to measure on, without a network, and its way into blocks of tokens.

Two kinds are on every machine: Python's own docstrings, and the READMEs and licences of installed
packages. Each is split by module (or package) into a calibration half and a held-out half that
share no paragraph, so that nothing is measured on what it was fitted on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

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


KINDS: dict[str, Callable[[Split], tuple[str, ...]]] = {
    "docstrings": python_docstrings,
    "licences": licences,
}


@functools.cache
def _docstrings() -> dict[Split, tuple[str, ...]]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = [p.relative_to(root) for p in root.rglob("*.py")]
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    modules = [m for m in modules if not skipped & set(m.parts)]

    def texts(module: Path) -> Iterator[str]:
        try:
            tree = ast.parse((root / module).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return
        for node in ast.walk(tree):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and (text := ast.get_docstring(node)):
                yield text

    return _halves({str(m): (m.parts[0], functools.partial(texts, m)) for m in modules})


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
    file = Path(path).expanduser()
    if file.is_dir():
        raise BadInput(f"{file} is a folder", help="name a text file")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        known = ", ".join(KINDS)
        raise BadInput(f"no such text file: {file}", help=f"or a built-in text: {known}") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read", why=error.strerror) from None
    if not data.strip():
        raise BadInput(f"{file} is empty", help="give it a few thousand words of ordinary text")
    if b"\0" in data:
        raise BadInput(f"{file} is not text", why="it holds zero bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{file} is not UTF-8", where=f"line {line}: byte 0x{data[error.start]:02x}",
            help=f"iconv -f LATIN1 -t UTF-8 '{file}' > new.txt, if it is Latin-1",
        ) from None  # fmt: skip


def texts_of(source: str | Path | Sequence[str], split: Split) -> tuple[str, tuple[str, ...]]:
    """(name, texts) of a built-in kind, a file, or texts.

    ``split`` chooses the half of a built-in kind; a file is taken whole.
    """
    if isinstance(source, str) and source in KINDS:
        return f"{source} ({split} half)", KINDS[source](split)
    if isinstance(source, str | Path):
        return str(source), tuple(_pieces(read_text(source)))
    texts = tuple(source)
    if not texts or not all(isinstance(t, str) for t in texts) or not any(map(str.strip, texts)):
        raise BadInput("there is no text", help="a list of texts, a file, or token ids")
    return f"{len(texts)} texts", texts


def _pieces(text: str, size: int = 4000) -> Iterator[str]:
    """Runs of whole paragraphs of about ``size`` characters; longer paragraphs are cut."""
    run = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for start in range(0, max(len(paragraph), 1), size):
            run += ("\n\n" if run else "") + paragraph[start : start + size]
            if len(run) >= size:
                yield run
                run = ""
    if run.strip():
        yield run


# ---------------------------------------------------------------------------- tokens


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
    import torch

    pool = list(texts)
    if seed is not None:
        random.Random(seed).shuffle(pool)
    wanted = max(limit // length, 1) * length
    ids: list[int] = []
    for text in pool:
        ids += _encode(tokenizer, text + "\n\n")
        if len(ids) >= wanted:
            break
    if len(ids) < 2:
        raise BadInput("the text is too short", why=f"{len(ids)} tokens", help="give more text")
    length = min(length, len(ids))
    count = min(len(ids), wanted) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _encode(tokenizer: Any, text: str) -> list[int]:
    if callable(tokenizer):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found = tokenizer.encode(text)
    return list(getattr(found, "ids", found))


def token_blocks(
    source: str | Path | Sequence[str] | Iterable[Tensor],
    tokenizer: Any,
    *,
    length: int = 256,
    limit: int = 16384,
    seed: int | None = 0,
    split: Split = "calibration",
    batch: int = 4,
) -> tuple[str, list[Tensor]]:
    """(name of the text, batches of token ids (batch, token)).

    Args:
        source: ``docstrings``, ``licences``, a file, texts, or batches of ids as they are.
        tokenizer: may be None where ids are given.
        length, limit, seed: as in :func:`blocks`.
        split: which half of a built-in text.
        batch: blocks in a batch.

    Raises:
        BadInput: text without a tokenizer, ids of a wrong kind, or as :func:`read_text`.
    """
    import torch

    if not isinstance(source, str | Path):
        given: list[Any] = [source] if isinstance(source, torch.Tensor) else list(source)
        if given and all(isinstance(item, torch.Tensor) for item in given):
            return "token ids", [_ids(item) for item in given]
        source = given
    name, texts = texts_of(source, split)
    if tokenizer is None:
        raise BadInput(
            "this model comes without a tokenizer, so text cannot be used",
            help="pass tokenizer=..., or batches of token ids instead of text",
        )
    found = blocks(tokenizer, texts, length, limit, seed)
    return name, list(found.split(batch))


def _ids(value: Tensor) -> Tensor:
    if value.is_floating_point() or value.is_complex() or value.dim() not in (1, 2):
        shape = tuple(value.shape)
        raise BadInput(f"token ids are integers (batch, token), not {value.dtype} {shape}")
    return value.long().view(-1, value.shape[-1])
