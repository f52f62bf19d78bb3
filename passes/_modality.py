"""Where a token's modality comes from: an input of the model, or ranges of its token ids."""

from __future__ import annotations

import itertools
import re

from sparsify.core import Refused
from sparsify.regions import Region

RANGE = re.compile(r"(\d+)-(\d+)")


def ranges_of(text: str) -> tuple[tuple[int, int], ...]:
    """``100-199/200-263`` -> ((100, 199), (200, 263)); Refused where it is malformed."""
    found = []
    for part in filter(None, text.split("/")):
        match = RANGE.fullmatch(part)
        if match is None or int(match[1]) > int(match[2]):
            raise Refused(
                f"tokens='{text}' is no list of ranges of token ids",
                suggestion="tokens=100-199/200-263 makes two modalities beside the rest",
            )
        found.append((int(match[1]), int(match[2])))
    ordered = sorted(found)
    if any(a[1] >= b[0] for a, b in itertools.pairwise(ordered)):
        raise Refused(f"the ranges of tokens='{text}' overlap")
    return tuple(found)


def source(region: Region, ids: str, tokens: str) -> str:
    """The port that tells the modality of each row of ``x``; Refused where there is none."""
    if bool(ids) == bool(tokens):
        both = (
            "both ids= and tokens= are given" if ids else "nothing says which modality a token is"
        )
        raise Refused(
            both,
            suggestion="ids=NAME of an integer input (batch, tokens), or tokens=100-199 for a"
            " range of token ids",
        )
    if tokens:
        ranges_of(tokens)
        if "tokens" not in region.ports:
            raise Refused(
                "its rows are not the tokens of an input that embeddings are looked up with",
                suggestion="ids=NAME of an integer input with one modality id per row",
            )
        return "tokens"
    port = f"input.{ids}"
    if port not in region.ports:
        known = sorted(n.removeprefix("input.") for n in region.ports if n.startswith("input."))
        raise Refused(
            f"the model has no integer input '{ids}' with one value per token of this layer",
            suggestion=f"it has: {', '.join(known)}" if known else None,
        )
    return port


def count(modalities: int, tokens: str) -> int:
    """How many modalities there are."""
    return len(ranges_of(tokens)) + 1 if tokens else modalities
