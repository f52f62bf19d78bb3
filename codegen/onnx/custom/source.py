"""The C source of a library of operators: our CPU kernels, and what ONNX Runtime calls.

One text for all that is compiled of it. Without ``LANES`` it is the registration; with ``LANES``
(floats of a vector: 4, 8, 16) and ``KIND`` it is one kernel. Kinds are routed feed-forward layers,
by their activation, with a gate or without, and the product that skips rows; sizes are attributes
of the nodes and shapes of their inputs.
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

WIDTHS = (4, 8, 16)  # LANES of operator.c: any processor, AVX2, AVX-512
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is compiled in: a routed layer of one kind, or :data:`PRODUCT`.

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
    def macro(self) -> str:
        """Of the operator's side in C."""
        return "LAYER" if self.act else "PRODUCT"

    @property
    def name(self) -> str:
        """Of the operator: other code has another, so a file never meets a wrong library."""
        if not self.act:
            return "SkippingMatMul"
        return f"RoutedFFN_{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}"


PRODUCT = Kind(False, "")


def source(kinds: Sequence[Kind]) -> str:
    """The text."""
    layers = [(i, k) for i, k in enumerate(kinds) if k is not PRODUCT]
    products = [i for i, k in enumerate(kinds) if k is PRODUCT]
    return "\n".join(
        [
            _text("call.h"),
            "#ifndef LANES",
            *(_text(name) for name in ("ort_api.h", "operator.c", "layer_op.c", "product_op.c")),
            _listed(kinds),
            _text("register.c"),
            "#else",
            "#define VALUE_FLOAT32 1",
            _either("LANES", [(n, sizes(n)) for n in WIDTHS]),
            part("vectors.h"),
            *(
                f"#if KIND == {i}\n{part('rows.c')}\n{_text('product_kernel.c')}#else"
                for i in products
            ),
            _either("KIND", [(i, kind(gated=k.gated)) for i, k in layers]),
            ELEMENTARY,
            _either("KIND", [(i, k.act) for i, k in layers]),
            part("totals.h"),
            _either("LANES", [(n, tiles(n)) for n in WIDTHS]),
            part("ffn.c"),
            part("prefill.c"),
            _text("layer_kernel.c"),
            *("#endif" for _ in products),
            "#endif",
            "",
        ]
    )


def _listed(kinds: Sequence[Kind]) -> str:
    """Operators and kernels, for register.c."""
    lines = [f"kernel_of routed_{i}_{n};" for i in range(len(kinds)) for n in WIDTHS]
    names = " ".join(f'{k.macro}("{k.name}")' for k in kinds)
    kernels = ", ".join(f"routed_{i}_##lanes" for i in range(len(kinds)))
    return "\n".join([*lines, f"#define NAMES {names}", f"#define KERNELS(lanes) {kernels}"])


def _either(name: str, texts: Sequence[tuple[int, str]]) -> str:
    """The text of the value that ``name`` has."""
    lines = [f"#{'elif' if i else 'if'} {name} == {v}\n{t}" for i, (v, t) in enumerate(texts)]
    return "\n".join([*lines, "#endif"] if lines else [])


def _text(file: str) -> str:
    return (_HERE / file).read_text(encoding="utf-8")
