"""What can be asked of an export; told apart here, so that a slip costs no waiting (no torch)."""

from __future__ import annotations

from sparsify.codegen.onnx.custom import DOMAIN
from sparsify.errors import BadInput, did_you_mean

DOMAINS: dict[str, tuple[str, ...]] = {  # target -> domains beside the standard's
    "portable": (),
    "ort": ("com.microsoft",),  # ONNX Runtime's own operators, where they are faster
    # and ours, in a library that is built beside the file and has to be registered
    "ort-custom": ("com.microsoft", DOMAIN),
}
TARGETS = tuple(DOMAINS)
# how feed-forward layers skip: not at all, dead units are set to zero; experts compute the tokens
# that use them; as ONNX Runtime's MoE; as an operator of ours; the fastest by measurement, or none
# where dense is faster
ROUTING = ("mask", "branch", "moe", "custom", "auto")
OFFERED = {  # target -> what auto measures
    "portable": ("mask", "branch"),
    "ort": ("mask", "branch", "moe"),
    "ort-custom": ("mask", "branch", "moe", "custom"),
}
WEIGHTS = ("float32", "float16", "bfloat16", "int8", "int4")  # how matrices are stored
BITS = {"int8": 8, "int4": 4}  # of those that are codes
OPSET = 20  # default: what ONNX Runtime 1.17 and later read
# 23 brings Attention, RMSNormalization and RotaryEmbedding, which ONNX Runtime 1.32 does not fuse
# from their parts: decoding and prefill are faster by a tenth and more (kv_heads.py)
OPSET_ORT = 23
INT4 = 21  # the first with 4-bit tensors: ONNX Runtime 1.20 and later
OPSETS = range(18, 25)  # the operators that torch's exporter writes begin at 18


def routing(target: str, asked: str | None) -> str:
    """``asked``; by itself ``auto`` for ONNX Runtime, whose operators are there to be fast."""
    return asked or ("mask" if target == "portable" else "auto")


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
    if routing == "custom" and target != "ort-custom":
        raise BadInput(
            f"target '{target}' has no routing 'custom'",
            why="operators of our own are in a library that the file needs",
            help="target='ort-custom', or routing='branch'",
        )
    if routing == "moe" and target == "portable":
        raise BadInput(
            f"target '{target}' has no routing 'moe'",
            why="the MoE operator is ONNX Runtime's own",
            help="target='ort', or routing='branch'",
        )
    if routing == "custom" and weights in BITS:
        raise BadInput(
            f"routing 'custom' has no weights in {weights}",
            why="our operator reads floats",
            help="routing='branch', or weights='float16'",
        )
    if opset is None:
        least = INT4 if weights == "int4" else OPSET
        return max(least, OPSET_ORT) if target != "portable" else least
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
