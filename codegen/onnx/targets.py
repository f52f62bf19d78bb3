"""What can be asked of an export; told apart here, so that a slip costs no waiting (no torch)."""

from __future__ import annotations

from sparsify.errors import BadInput, did_you_mean

TARGETS = ("portable",)  # the standard's operators only
ROUTING = ("mask", "branch")  # dead units are set to zero; unused experts are not run
WEIGHTS = ("float32", "float16", "bfloat16", "int8", "int4")  # how matrices are stored
OPSET = 20  # default: what ONNX Runtime 1.17 and later read
INT4 = 21  # the first with 4-bit tensors: ONNX Runtime 1.20 and later
OPSETS = range(18, 25)  # the operators that torch's exporter writes begin at 18


def check(target: str, routing: str, opset: int | None, weights: str = "float32") -> int:
    """The opset to write; BadInput for what is not on offer."""
    for name, value, legal in (
        ("target", target, TARGETS), ("routing", routing, ROUTING), ("weights", weights, WEIGHTS),
    ):  # fmt: skip
        if value not in legal:
            raise BadInput(
                f"no {name} '{value}'",
                help=did_you_mean(value, legal) or f"one of: {', '.join(legal)}",
            )
    if opset is None:
        return INT4 if weights == "int4" else OPSET
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise BadInput(
            f"opset {opset} cannot be written",
            why=f"the exporter's operators are those of opset {OPSETS[0]} to {OPSETS[-1]}",
            help=f"leave it out: {OPSET} is read by ONNX Runtime 1.17 and later",
        )
    if weights == "int4" and opset < INT4:
        raise BadInput(
            f"opset {opset} has no weights in 4 bits",
            why=f"4-bit tensors are part of the standard from opset {INT4} on",
            help=f"--opset {INT4}, or weights in int8",
        )
    return opset
