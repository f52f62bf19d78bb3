"""Which layers of a stack are one layer applied again: the plans of depth-mor and layers-tie.

The four sharing schemes of Mixture-of-Recursions (Bae et al., arXiv:2507.10524, section 2.1), for
``recursions`` = R and a stack of L layers:

* ``cycle``: L/R layers as a whole are applied R times (0 1 2 | 0 1 2 | 0 1 2);
* ``sequence``: every layer is applied R times before the next one (0 0 0 | 1 1 1 | 2 2 2);
* ``middle-cycle``, ``middle-sequence``: the same between the first and the last layer, which stay
  alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsify.core import Refused

SCHEMES = ("cycle", "middle-cycle", "sequence", "middle-sequence")


def runs(count: int, sharing: str, recursions: int) -> list[list[range]]:
    """What is recursed: every run is a list of ``recursions`` steps, each a range of layers.

    Raises:
        Refused: the layers cannot be divided so.
    """
    middle = sharing.startswith("middle-")
    first, inner = (1, count - 2) if middle else (0, count)
    what = f"{inner} layers between the first and the last" if middle else f"{count} layers"
    if inner < recursions or inner % recursions:
        legal = [n for n in range(2, inner + 1) if inner % n == 0]
        hint = f"recursions={' or '.join(map(str, legal))}" if legal else None
        raise Refused(f"{what} cannot be divided into {recursions} equal steps", suggestion=hint)
    size = inner // recursions
    if sharing.endswith("cycle"):
        starts = range(first, first + inner, size)
        return [[range(at, at + size) for at in starts]]
    heads = range(first, first + inner, recursions)
    return [[range(at, at + 1) for at in range(head, head + recursions)] for head in heads]


def groups(count: int, sharing: str, recursions: int) -> Iterator[tuple[int, ...]]:
    """Layers that are one layer under the scheme; layers that stay alone are in no group."""
    for steps in runs(count, sharing, recursions):
        yield from zip(*steps, strict=True)
