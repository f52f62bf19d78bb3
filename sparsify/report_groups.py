"""Say it once: thirty layers that share a remark are one line, ``model.layers.[0-29].mlp``.

The collapsed paths are the path patterns of ``at=`` and ``skip=``, so they can be pasted there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from sparsify.core import Moved, Remark

_INDEX = re.compile(r"(?<![^.])(\d+)(?![^.])")  # a whole dotted component that is a number
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


def collapse(paths: Iterable[str]) -> tuple[str, ...]:
    """``paths`` with runs of layer numbers written as ranges, in order of first appearance."""
    shapes: dict[str, list[tuple[str, ...]]] = {}
    for path in dict.fromkeys(paths):
        shapes.setdefault(_INDEX.sub("\0", path), []).append(tuple(_INDEX.findall(path)))
    found = []
    for shape, indices in shapes.items():
        for place in reversed(range(shape.count("\0"))):
            indices = _merge(indices, place)
        for index in indices:
            parts = shape.split("\0")
            found.append(parts[0] + "".join(i + p for i, p in zip(index, parts[1:], strict=True)))
    return tuple(found)


def _merge(indices: Sequence[tuple[str, ...]], place: int) -> list[tuple[str, ...]]:
    """Tuples that differ only at ``place`` become one, with a range there."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for index in indices:
        groups.setdefault((index[:place], index[place + 1 :]), []).append(int(index[place]))
    return [(*head, ranges(values), *tail) for (head, tail), values in groups.items()]


def ranges(values: Iterable[int]) -> str:
    """``[0-3,7]`` of 0, 1, 2, 3, 7; a lone number stays bare."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    return "[" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "]"


@dataclasses.dataclass(frozen=True)
class RemarkGroup:
    """Remarks that say the same; ``reason`` holds ``a..b`` where only a number differs."""

    kind: str
    region_kind: str
    paths: tuple[str, ...]
    count: int
    reason: str
    suggestion: str | None
    where: str | None


def group_remarks(remarks: Iterable[Remark]) -> tuple[RemarkGroup, ...]:
    """Equal remarks together, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Remark]] = {}
    for remark in remarks:
        same = _NUMBER.sub("\0", f"{remark.reason}\n{remark.suggestion or ''}")
        groups.setdefault((remark.kind, remark.region_kind, same), []).append(remark)
    return tuple(
        RemarkGroup(
            kind=members[0].kind,
            region_kind=members[0].region_kind,
            paths=collapse(m.region for m in members),
            count=len(members),
            reason=spread([m.reason for m in members]),
            suggestion=spread([m.suggestion or "" for m in members]) or None,
            where=members[0].where,
        )
        for members in groups.values()
    )


def spread(texts: Sequence[str]) -> str:
    """Texts that differ only in numbers as one text: ``error 0.02..0.05 in 8 experts``."""
    numbers = list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
    parts = _NUMBER.split(texts[0])
    filled = [parts[0]]
    for values, part in zip(numbers, parts[1:], strict=True):
        ordered = sorted(set(values), key=lambda v: float(v.replace(",", "")))
        filled += [ordered[0] if len(ordered) == 1 else f"{ordered[0]}..{ordered[-1]}", part]
    return "".join(filled)


@dataclasses.dataclass(frozen=True)
class WeightGroup:
    """Weights that moved in the same way."""

    dense: str
    sparse: str
    how: str
    count: int


def group_weights(weights: Iterable[Moved]) -> tuple[WeightGroup, ...]:
    """The weight map, one line per role instead of one per layer."""
    groups: dict[tuple[str, ...], list[Moved]] = {}
    for moved in weights:
        texts = (moved.dense, moved.sparse, *moved.how.split())
        groups.setdefault(tuple(_INDEX.sub("\0", text) for text in texts), []).append(moved)
    return tuple(
        WeightGroup(
            ", ".join(collapse(m.dense for m in members)),
            ", ".join(collapse(m.sparse for m in members)),
            " ".join(
                ", ".join(collapse(words))
                for words in zip(*(m.how.split() for m in members), strict=True)
            ),
            len(members),
        )
        for members in groups.values()
    )
