"""Path patterns, ``model.layers.[4-27].mlp`` or ``*.mlp|*.ffn``: which regions a stage works on.

``*`` stands for any text, dots included; ``[4-27]`` and ``[0,2,5-]`` for a whole number in these
ranges; ``|`` separates alternatives. A pattern has to match the whole path.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

_RANGE = re.compile(r"(\d*)(-?)(\d*)")
_PIECE = re.compile(r"\*|\[[^\[\]]*\]|[^*\[\]]+")

Ranges = tuple[tuple[int, float], ...]
Piece = str | Ranges  # "*" is the star; other texts are literal


def match_path(pattern: str, path: str) -> bool:
    """Whether ``pattern`` matches the whole of ``path``. Raises ValueError on a bad pattern."""
    return any(_match(pieces, path) for pieces in _compiled(pattern))


def bad_pattern(pattern: str) -> str | None:
    """Why ``pattern`` is not a path pattern, or None."""
    try:
        _compiled(pattern)
    except ValueError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> tuple[tuple[Piece, ...], ...]:
    return tuple(tuple(_pieces(one)) for one in pattern.split("|"))


def _pieces(pattern: str) -> list[Piece]:
    if not pattern:
        raise ValueError("an alternative is empty")
    pieces: list[Piece] = []
    at = 0
    while at < len(pattern):
        found = _PIECE.match(pattern, at)
        if found is None:
            raise ValueError(f"'{pattern[at]}' has no partner")
        word = found.group()
        at = found.end()
        if word[0] == "[":
            pieces.append(tuple(_range(part) for part in word[1:-1].split(",")))
        elif word != "*" or pieces[-1:] != ["*"]:
            pieces.append(word)
    return pieces


def _range(text: str) -> tuple[int, float]:
    found = _RANGE.fullmatch(text.strip())
    if found is None or not (found[1] or found[3]):
        raise ValueError(f"'[{text}]' is not a range of numbers such as [4-27]")
    low = int(found[1] or 0)
    high = low if not found[2] else float(found[3]) if found[3] else float("inf")
    if high < low:
        raise ValueError(f"the range '[{text}]' is empty")
    return low, high


def _match(pieces: tuple[Piece, ...], path: str) -> bool:
    reached = {0}  # all ends of all ways to match the pieces so far
    for piece in pieces:
        reached = {end for start in reached for end in _ends(piece, path, start)}
    return len(path) in reached


def _ends(piece: Piece, path: str, start: int) -> Iterable[int]:
    """Where a match of ``piece`` that starts at ``start`` can end."""
    if piece == "*":
        return range(start, len(path) + 1)
    if isinstance(piece, str):
        return (start + len(piece),) if path.startswith(piece, start) else ()
    end = start
    while end < len(path) and path[end].isdecimal():
        end += 1
    if end == start or (start and path[start - 1].isdecimal()):
        return ()  # no number here, or the middle of one
    return (end,) if any(low <= int(path[start:end]) <= high for low, high in piece) else ()
