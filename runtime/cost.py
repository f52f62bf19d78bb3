"""What a token costs: floating-point operations and bytes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one token.

    Attributes:
        flops: two per multiply-add, matmuls only.
        bytes: weight bytes read when this token is decoded alone.
        cache: bytes of key/value cache read when it is decoded alone.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cache: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.cache + other.cache)
