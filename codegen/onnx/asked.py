"""One export, as it was asked for; a slip in a count costs no waiting here (no torch)."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsify.codegen.machine import usable_cores
from sparsify.codegen.onnx.targets import OPSET
from sparsify.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the file is to be, with what was left out filled in.

    Attributes:
        target, routing, weights: of :mod:`sparsify.codegen.onnx.targets`; opset: to write.
        tokens, threads: of the calls in ONNX Runtime that ``routing="auto"`` is to make fast.
        external_data: weights in a file of their own; None = where one file cannot hold them.
        check: whether the file is held against the model; force: whether a file is replaced.
    """

    target: str = "portable"
    routing: str = "mask"
    opset: int = OPSET
    weights: str = "float32"
    tokens: int = 1
    threads: int = 1
    external_data: bool | None = None
    check: bool = True
    force: bool = False

    @property
    def calls(self) -> str:
        """The calls to be timed, in words."""
        inside = "" if self.weights == "float32" else f", weights in {self.weights}"
        return f"{_count(self.tokens, 'token')} on {_count(self.threads, 'thread')}{inside}"


def counts(tokens: Any, threads: Any, routing: str) -> None:
    """BadInput for counts of tokens or threads that cannot be timed; threads None = as torch."""
    if not _positive(tokens):
        raise BadInput(f"a call of {tokens!r} tokens cannot be timed", help="1 (decoding) or more")
    if threads is None:
        return
    if not _positive(threads):
        raise BadInput(f"{threads!r} threads cannot compute", help="1 or more")
    cores = usable_cores()
    if routing == "auto" and threads > cores:
        raise BadInput(
            f"{threads} threads cannot be timed here",
            why=f"routing 'auto' times them on this machine, which has {_count(cores, 'core')}",
            help="name the form (routing='branch', ...), or export on the machine it is for",
        )


def _positive(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
