"""attn-moh: turn attention heads into experts and route every token to a few of them.

Mixture of Heads (Jin et al., arXiv:2410.11842): heads are units, ``y = sum over live heads of
head_h(x) W_o^h + b_o``; some are shared (always live). Keys and values stay complete, so later tokens can
attend to every position; the query projection, the scores, the weighted sum and the columns of the output
projection are computed for live (token, head) pairs only. With grouped queries, a token whose whole
key/value group is dead costs nothing there. Unlike the paper, weights are exactly one at conversion
(its two-stage softmax weights change the dense model's output), and what a dead head gives on average
is added back.

At initialization, all heads live, the output projection is summed head by head: REORDERED.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.core import Moved, Pass, Refused, Rewrite, Splice, option
from sparsify.regions import Attention

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.runtime.router import Router

TOKENS = 8192  # calibration tokens kept per layer


@dataclasses.dataclass(frozen=True)
class AttnMoh(Pass[Attention]):
    """Attention -> mixture of its own heads."""

    active: float = option(1.0, "fraction of heads that a token uses", gt=0, le=1)
    shared: int = option(-1, "heads that every token uses; -1 = a quarter of them", ge=-1)
    router: str = option(
        "auto",
        "auto = threshold if calibrated, else top-k",
        among=("auto", "threshold", "top-k"),
    )
    compensate: bool = option(True, "add back the mean output of the heads a token drops")

    def _shared(self, attention: Attention) -> int:
        return attention.heads // 4 if self.shared < 0 else self.shared

    def check(self, attention: Attention) -> None:
        if attention.heads < 2:
            raise Refused("a single head cannot be routed")
        if self._shared(attention) >= attention.heads:
            raise Refused(
                f"{self._shared(attention)} shared of {attention.heads} heads leave none to route",
                suggestion=f"shared={attention.heads // 4}",
            )
        if self.router == "threshold" and "x" not in attention.samples:
            raise Refused(
                "threshold routing needs calibration data",
                suggestion="give calibration=..., or router=top-k",
            )

    def taps(self, region: Attention) -> Mapping[str, int]:
        return {"x": TOKENS, "context": TOKENS}

    def rewrite(self, attention: Attention) -> Rewrite:
        from sparsify.runtime.attend import RoutedAttend
        from sparsify.runtime.heads import HeadOrder, RoutedColumns, RoutedRows

        router, order, dropped = self._router(attention)
        del HeadOrder
        raise NotImplementedError

    def _router(self, attention: Attention) -> tuple[Router, Tensor, Tensor | None]:
        raise NotImplementedError
