"""What a search is asked for: ``flops=0.6``, ``bytes=0.6`` or ``speed=1.5``. Imports no torch."""

from __future__ import annotations

import dataclasses
import math

from sparsify.errors import BadInput, did_you_mean

KINDS = ("flops", "bytes", "speed")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a model may cost.

    Attributes:
        kind: ``flops`` per token or ``bytes`` read to decode one, as a share of the dense model's;
            ``speed`` of decoding, in times the dense model's.
        value: what is asked for.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def target_of(text: str) -> Target:
    """``flops=0.6`` as a Target.

    Raises:
        BadInput: an unknown kind, no number, or one out of range.
    """
    kind, equals, value = text.strip().partition("=")
    if kind not in KINDS:
        raise BadInput(
            f"no target '{kind}'",
            help=did_you_mean(kind, KINDS) or "flops=0.6, bytes=0.6 or speed=1.5",
        )
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    good = number > 1 and math.isfinite(number) if kind == "speed" else 0 < number < 1
    if not equals or not good:
        legal = "above 1: times the dense speed" if kind == "speed" else "above 0 and below 1"
        raise BadInput(f"target '{text}' is out of range", help=f"{kind} is {legal}")
    return Target(kind, number)
