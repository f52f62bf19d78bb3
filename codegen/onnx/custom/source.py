"""The C source of a library of operators: our CPU kernels, and what ONNX Runtime calls.

One text for all that is compiled of it. Without ``LANES`` it is the registration; with ``LANES``
(floats of a vector: 4, 8, 16) and ``KIND`` it is one kernel of one kind of layer. A kind is an
activation, with a gate or without; sizes are attributes of the nodes and shapes of their inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from sparsify.codegen.cpu.call import part
from sparsify.codegen.cpu.ffn_source import ELEMENTARY, kind, sizes, tiles
from sparsify.codegen.elementwise import c_source
from sparsify.runtime.program import Program

DOMAIN = "sparsify"
WIDTHS = (4, 8, 16)  # LANES of operator.c: any processor, AVX2, AVX-512
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is compiled in.

    Attributes:
        gated: the activation is of (up, gate), else of (up,).
        act: its C source.
    """

    gated: bool
    act: str

    @staticmethod
    def of(activation: Program) -> Kind:
        """CannotLower where the activation has no scalar code."""
        return Kind(len(activation.inputs) == 2, c_source(activation))

    @property
    def name(self) -> str:
        """Of the operator: other code has another, so a file never meets a wrong library."""
        return f"RoutedFFN_{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}"


def source(kinds: Sequence[Kind]) -> str:
    """The text."""
    return "\n".join(
        [
            _text("call.h"),
            "#ifndef LANES",
            _text("ort_api.h"),
            _listed(kinds),
            _text("operator.c"),
            "#else",
            "#define VALUE_FLOAT32 1",
            *(f"#{'if' if i == 0 else 'elif'} LANES == {n}\n{sizes(n)}" for i, n in _widths()),
            "#endif",
            *(f"#{_if(i)} KIND == {i}\n{kind(gated=k.gated)}" for i, k in enumerate(kinds)),
            "#endif",
            part("vectors.h"),
            ELEMENTARY,
            *(f"#{_if(i)} KIND == {i}\n{k.act}" for i, k in enumerate(kinds)),
            "#endif",
            part("totals.h"),
            *(f"#{_if(i)} LANES == {n}\n{tiles(n)}" for i, n in _widths()),
            "#endif",
            part("ffn.c"),
            part("prefill.c"),
            _text("share.c"),
            "#endif",
            "",
        ]
    )


def _listed(kinds: Sequence[Kind]) -> str:
    """Names and kernels, for operator.c."""
    lines = [f"kernel_of routed_{i}_{n};" for i in range(len(kinds)) for n in WIDTHS]
    names = " ".join(f'NAMED("{k.name}")' for k in kinds)
    kernels = ", ".join(f"routed_{i}_##lanes" for i in range(len(kinds)))
    return "\n".join([*lines, f"#define NAMES {names}", f"#define KERNELS(lanes) {kernels}"])


def _widths() -> list[tuple[int, int]]:
    return list(enumerate(WIDTHS))


def _if(i: int) -> str:
    return "elif" if i else "if"


def _text(file: str) -> str:
    return (_HERE / file).read_text(encoding="utf-8")
