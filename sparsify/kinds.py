"""Texts that are on every machine, without a network, each in two halves that share nothing.

Python's own docstrings; the READMEs and licences of installed packages; the language reference,
which the interactive help reads; and the standard library's code without its docstrings and
comments; *mixed* is all of them. Each is split by module (package, topic) into a calibration half
and a held-out half that share no paragraph, so that nothing is measured on what it was fitted on; a
module's docstrings and its code are in the same half.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

Split = Literal["calibration", "held-out"]
SPLITS: tuple[Split, ...] = get_args(Split)
CHARACTERS = 400_000  # of each half: about 100,000 tokens
_SHORTEST = 300  # characters of a text worth keeping


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


def mixed(split: Split) -> tuple[str, ...]:
    """As much of each of the others: what is fitted on it suits no single kind of text best."""
    found: list[str] = []
    for kind in (python_docstrings, licences, reference, code):
        size = 0
        for text in kind(split):
            if size < CHARACTERS // 4:
                found.append(text)
                size += len(text)
    return tuple(found)


KINDS: dict[str, Callable[[Split], tuple[str, ...]]] = {
    "docstrings": python_docstrings,
    "licences": licences,
    "reference": reference,
    "code": code,
    "mixed": mixed,
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
