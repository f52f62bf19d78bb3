"""Scalar steps as text: C on float32, and Triton on float32 blocks."""

from __future__ import annotations

import math

from sparsify.codegen.scalar import CannotLower, Let, Value

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "eq": "==", "ne": "!=",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------- C

_C_CALLS = {
    "exp": "expf", "log": "logf", "sqrt": "sqrtf", "tanh": "tanhf", "erf": "erff",
    "expm1": "expm1f", "log1p": "log1pf", "abs": "fabsf",
}  # fmt: skip
_C_HELPERS = {
    "round_bf16": """\
static inline float round_bf16(float x) {
    union { float f; unsigned u; } v = {x};
    if (x != x) return x;
    v.u = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) & 0xffff0000u;  /* to nearest, ties to even */
    return v.f;
}
""",
    "round_f16": "static inline float round_f16(float x) { return (float)(_Float16)x; }\n",
}


def c_step(let: Let) -> tuple[str, dict[str, str]]:
    """The right-hand side in C, and the helper functions that it calls."""
    a = [_c_value(v) for v in let.args]
    if let.op in _INFIX:
        return f"{a[0]} {_INFIX[let.op]} {a[1]}", {}
    if let.op in _C_CALLS:
        return f"{_C_CALLS[let.op]}({a[0]})", {}
    if let.op in _C_HELPERS:
        return f"{let.op}({a[0]})", {let.op: _C_HELPERS[let.op]}
    if let.op in ("max", "min"):
        sign = ">" if let.op == "max" else "<"
        return f"({a[0]} {sign} {a[1]} || {a[0]} != {a[0]}) ? {a[0]} : {a[1]}", {}
    text = {
        "copy": "{0}",
        "neg": "-{0}",
        "sigmoid": "1.0f / (1.0f + expf(-{0}))",
        "where": "{0} ? {1} : {2}",
        "not": "!{0}",
        "and": "{0} && {1}",
        "or": "{0} || {1}",
    }.get(let.op)
    if text is None:
        raise CannotLower(let.op, "in C")
    return text.format(*(f"({v})" if v.startswith("-") else v for v in a)), {}


def _c_value(value: Value) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value!r}f"


# ----------------------------------------------------------------------------------------- Triton

# Triton has no tanh, expm1 or log1p of its own that every target and the interpreter know: these
# are jitted functions of sparsify.codegen.triton.math.
_TRITON = {
    "neg": "-{0}",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "abs": "tl.abs({0})",
    "erf": "tl.erf({0})",
    "tanh": "tanh({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "expm1": "expm1({0})",
    "log1p": "log1p({0})",
    "where": "tl.where({0}, {1}, {2})",
    "max": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "min": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "not": "{0} == 0",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "round_f16": "{0}.to(tl.float16).to(tl.float32)",
    "round_bf16": "{0}.to(tl.bfloat16).to(tl.float32)",
}


def triton_step(let: Let) -> str:
    """The right-hand side in Triton."""
    a = [_triton_value(v) for v in let.args]
    if let.op in _INFIX:
        return f"{a[0]} {_INFIX[let.op]} {a[1]}"
    if let.op not in _TRITON:
        raise CannotLower(let.op, "in Triton")
    return _TRITON[let.op].format(*(f"({v})" if v.startswith("-") else v for v in a))


def _triton_value(value: Value) -> str:
    if isinstance(value, str):
        return value
    return repr(value) if math.isfinite(value) else f'float("{value}")'
