"""The user's text, read piece by piece: files of any size, iterables of any length.

A text file is a run of paragraphs; a JSONL file (``.jsonl``, ``.ndjson``) has one text a line: a
string, or an object with the key ``text`` (or ``content``). What is wrong with a file is told with
the line. Of what is long, a seeded uniform sample is kept, in memory that does not grow with it.
"""

from __future__ import annotations

import codecs
import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsify.errors import BadInput

PIECE = 4000  # characters of a piece of a file
CHUNK = 2**20  # bytes read at once
MOST = 2**28  # characters of a source that are looked at
KEYS = ("text", "content")
RECORDS = (".jsonl", ".ndjson")
_ORDINARY = "give it a few thousand words of ordinary text"


def characters(path: str | Path, known: Iterable[str] = ()) -> Iterator[str]:
    """The text of a UTF-8 file in chunks.

    Args:
        known: built-in texts, for the message where there is no such file.

    Raises:
        BadInput: missing, a folder, unreadable, empty, binary or in another encoding.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise BadInput(f"{file} is a folder", help="name a text file")
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines, empty, ended = 1, True, False
    try:
        with file.open("rb") as opened:
            while not ended:
                data = opened.read(CHUNK)
                ended = not data
                if b"\0" in data:
                    raise BadInput(f"{file} is not text", why="it holds zero bytes")
                held = decoder.getstate()[0]  # bytes of a character that the last chunk cut
                try:
                    text = decoder.decode(data, final=ended)
                except UnicodeDecodeError as error:
                    bad = (held + data)[error.start : error.start + 1]
                    line = lines + (held + data)[: error.start].count(b"\n")
                    raise BadInput(
                        f"{file} is not UTF-8", where=f"line {line}: byte 0x{bad.hex()}",
                        help=f"iconv -f LATIN1 -t UTF-8 '{file}' > new.txt, if it is Latin-1",
                    ) from None  # fmt: skip
                lines += data.count(b"\n")
                empty = empty and not text.strip()
                if text:
                    yield text
    except FileNotFoundError:
        names = ", ".join(known)
        help = f"or a built-in text: {names}" if names else None  # noqa: A001
        raise BadInput(f"no such text file: {file}", help=help) from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read", why=error.strerror) from None
    if empty:
        raise BadInput(f"{file} is empty", help=_ORDINARY)


def file_texts(path: str | Path, known: Iterable[str] = ()) -> Iterator[str]:
    """The texts of a file: records of a JSONL file, else pieces of about PIECE characters."""
    if Path(path).suffix.lower() in RECORDS:
        return _records(path, known)
    return pieces(characters(path, known))


def _records(path: str | Path, known: Iterable[str]) -> Iterator[str]:
    found = False
    for number, value in json_lines(path, known):
        text = value
        if isinstance(value, dict):
            text = next((value[key] for key in KEYS if key in value), None)
        if not isinstance(text, str):
            have = (
                f"an object with {', '.join(value) or 'nothing'}" if isinstance(value, dict) else ""
            )
            raise BadInput(
                f"{path} holds a line without a text",
                where=f"line {number}: {have or f'a {type(value).__name__}'}",
                help='a line is "some text" or {"text": "some text"}',
            )
        if text.strip():
            found = True
            yield text
    if not found:
        raise BadInput(f"{path} is empty", why="no line has any text", help=_ORDINARY)


def json_lines(path: str | Path, known: Iterable[str] = ()) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of a JSONL file that is not blank; raises BadInput."""
    for number, line in enumerate(lines_of(characters(path, known)), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            why = getattr(error, "msg", str(error))
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise BadInput(
                f"{path} holds a line that is not JSON",
                where=f"line {number}{at}: {line.strip()[:60]}",
                why=why,
            ) from None


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """Lines of a text that comes in chunks."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
    if rest:
        yield rest


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Runs of whole paragraphs of about ``size`` characters; longer paragraphs are cut."""
    run = ""
    for paragraph in _paragraphs(chunks, size):
        run += ("\n\n" if run else "") + paragraph
        if len(run) >= size:
            yield run
            run = ""
    if run.strip():
        yield run


def _paragraphs(chunks: Iterable[str], size: int) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *whole, rest = re.split(r"\n\s*\n", rest + chunk)
        if len(rest) > 4 * size:  # a paragraph without end
            whole.append(rest)
            rest = ""
        for paragraph in whole:
            yield from _cut(paragraph, size)
    yield from _cut(rest, size)


def _cut(text: str, size: int) -> Iterator[str]:
    for start in range(0, max(len(text), 1), size):
        yield text[start : start + size]


def sample(texts: Iterable[str], size: int, seed: int, most: int = MOST) -> list[str]:
    """A uniform sample of texts, in random order, of ``size`` characters or a little more.

    Every text draws a key, and those with the lowest keys stay (Vitter's reservoir by keys), so
    one pass over a stream is enough and no more than the sample is held.

    Args:
        size: characters wanted; fewer where the texts are shorter in all.
        most: characters that are looked at.
    """
    draw = random.Random(seed)
    heap: list[tuple[float, int, str]] = []  # the highest key first
    held = looked = 0
    for number, text in enumerate(texts):
        for part in _cut(text, 4 * PIECE):
            heapq.heappush(heap, (-draw.random(), number, part))
            held += len(part)
            looked += len(part)
            while held - len(heap[0][2]) >= size:
                held -= len(heapq.heappop(heap)[2])
        if looked >= most:
            break
    return [text for _, _, text in sorted(heap, reverse=True)]
