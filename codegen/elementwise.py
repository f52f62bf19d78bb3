"""Elementwise programs as scalar code: a routed layer's activation inside a kernel.

A :class:`~sparsify.runtime.program.Program` (the user's own ATen operations) is lowered to a short
list of scalar steps, which print as a C function on float32 or as a Triton function on float32
blocks; their derivatives are steps of the same kind. Values are float32 whatever the model's dtype;
casts that the program names round. What is not known is refused (:class:`CannotLower`), never
guessed: in-place operations, shapes, integers, random numbers.

Comparisons give conditions, which only ``where`` and logical operations take. Branches are written
so that NaN comes through where ATen lets it through, and so that the derivative at a kink is
ATen's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsify.codegen.elementwise_print import c_step, triton_step
from sparsify.codegen.scalar import CONDITIONS, CannotLower, Gradient, Let, Scalar, Value, Writer
from sparsify.runtime.program import Program, Ref, Step

__all__ = [
    "CannotLower",
    "Scalar",
    "c_source",
    "canonical",
    "lower",
    "lower_gradient",
    "triton_source",
]

_Lowering = Callable[..., Value]
_OPS: dict[str, _Lowering] = {}


def lower(program: Program) -> Scalar:
    """``program`` as scalar steps; CannotLower where an operation is not known."""
    if program.wide:
        raise CannotLower("float64 arithmetic")
    w = Writer(program.inputs)
    values: dict[str, Value] = {name: name for name in program.inputs}

    def load(arg: Any, op: str) -> Any:
        if isinstance(arg, Ref):
            return values[arg.name]
        if arg is None or isinstance(arg, bool | int | float | str | torch.dtype):
            return arg
        raise CannotLower(op, f"an argument of type {type(arg).__name__}")

    for step in program.steps:
        found = _OPS.get(step.op)
        if found is None:
            raise CannotLower(step.op)
        kwargs = {k: v for k, v in step.kwargs.items() if not (k in _IDLE and v in _IDLE[k])}
        try:
            args = [load(a, step.op) for a in step.args]
            values[step.name] = found(w, *args, **{k: load(a, step.op) for k, a in kwargs.items()})
        except (TypeError, ValueError) as error:  # an argument that the lowering does not take
            raise CannotLower(step.op, str(error)) from error
    result = w.number(values[program.output])
    return Scalar(program.inputs, tuple(w.steps), (result,))


def lower_gradient(program: Program) -> Scalar:
    """Inputs and ``grad`` -> the value, then the gradient of each input times ``grad``."""
    return Gradient(lower(program)).scalar()


def canonical(program: Program) -> Program:
    """``program`` with its steps renamed in order: layers whose activations are equal share code."""
    names = {name: Ref(name) for name in program.inputs}

    def renamed(value: Any) -> Any:
        if isinstance(value, Ref):
            return names[value.name]
        if isinstance(value, list | tuple):
            return type(value)(renamed(v) for v in value)
        if isinstance(value, Mapping):
            return {k: renamed(v) for k, v in value.items()}
        return value

    steps = []
    for i, step in enumerate(program.steps):
        args, kwargs = renamed(step.args), renamed(step.kwargs)
        names[step.name] = Ref(f"{program.inputs[0]}_{i}")
        steps.append(Step(names[step.name].name, step.op, args, kwargs))
    return Program(program.inputs, tuple(steps), names[program.output].name, program.wide)


def c_source(program: Program, name: str = "act") -> str:
    """``static inline float name(float up, float gate)`` and what it calls, after <math.h>."""
    scalar = lower(program)
    lines, helpers = [], dict[str, str]()
    for let in scalar.lets:
        text, needs = c_step(let)
        helpers.update(needs)
        kind = "int" if let.op in CONDITIONS else "float"
        lines.append(f"    const {kind} {let.name} = {text};")
    head = ", ".join(f"float {i}" for i in scalar.inputs)
    body = "\n".join([*lines, f"    return {_c_value(scalar.outputs[0])};"])
    return "\n".join([*helpers.values(), f"static inline float {name}({head}) {{\n{body}\n}}\n"])


def triton_source(program: Program, name: str = "act", *, gradient: bool = False) -> str:
    """A ``@triton.jit`` function of float32 blocks (and ``grad``); returns what `lower` gives."""
    scalar = lower_gradient(program) if gradient else lower(program)
    like = scalar.inputs[0]
    lines = [f"    {let.name} = {triton_step(let)}" for let in scalar.lets]
    results = [f"{like} * 0.0 + {o!r}" if isinstance(o, float) else str(o) for o in scalar.outputs]
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}({', '.join(scalar.inputs)}):",
            *lines,
            f"    return {', '.join(results)}",
            "",
        ]
    )


def _c_value(value: Value) -> str:
    return c_step(Let("", "copy", (value,)))[0]


# ------------------------------------------------------------------ ATen operations, one by one

_HALF: Mapping[torch.dtype, str] = {torch.float16: "round_f16", torch.bfloat16: "round_bf16"}
_IDLE: dict[str, tuple[Any, ...]] = {  # keywords that change no value
    "memory_format": (None, torch.preserve_format, torch.contiguous_format),
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "non_blocking": (None, False, True),
    "copy": (None, False, True),
    "device": (None, torch.device("cpu"), torch.device("cuda")),
}


def _op(*names: str) -> Callable[[_Lowering], _Lowering]:
    def put(function: _Lowering) -> _Lowering:
        for name in names:
            full = name if name.count(".") else f"{name}.default"
            _OPS[f"aten.{full}"] = function
        return function

    return put


@_op("alias", "clone", "detach", "lift_fresh_copy", "contiguous")
def _same(w: Writer, x: Value) -> Value:
    return x


@_op("dropout", "native_dropout")
def _dropout(w: Writer, x: Value, p: float, train: bool) -> Value:
    if train and p:
        raise CannotLower("aten.dropout.default", "in training")
    return x


@_op("_to_copy", "to.dtype")
def _cast(w: Writer, x: Value, dtype: Any = None, *rest: Any) -> Value:
    if dtype in (None, torch.float32):
        return w.number(x)
    if dtype not in _HALF:
        raise CannotLower("aten._to_copy.default", f"to {dtype}")
    return w(_HALF[dtype], w.number(x))


@_op("add.Tensor", "add.Scalar")
def _add(w: Writer, x: Value, y: Value, alpha: float = 1) -> Value:
    return w("add", x, y if alpha == 1 else w("mul", y, float(alpha)))


@_op("sub.Tensor", "sub.Scalar")
def _sub(w: Writer, x: Value, y: Value, alpha: float = 1) -> Value:
    return w("sub", x, y if alpha == 1 else w("mul", y, float(alpha)))


@_op("rsub.Tensor", "rsub.Scalar")
def _rsub(w: Writer, x: Value, y: Value, alpha: float = 1) -> Value:
    return w("sub", y, x if alpha == 1 else w("mul", x, float(alpha)))


@_op("mul.Tensor", "mul.Scalar")
def _mul(w: Writer, x: Value, y: Value) -> Value:
    return w("mul", x, y)


@_op("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(w: Writer, x: Value, y: Value) -> Value:
    return w("div", x, y)


@_op("maximum")
def _maximum(w: Writer, x: Value, y: Value) -> Value:
    return w("max", x, y)


@_op("minimum")
def _minimum(w: Writer, x: Value, y: Value) -> Value:
    return w("min", x, y)


@_op("reciprocal")
def _reciprocal(w: Writer, x: Value) -> Value:
    return w("div", 1.0, x)


@_op("square")
def _square(w: Writer, x: Value) -> Value:
    return w("mul", x, x)


@_op("pow.Tensor_Scalar")
def _pow(w: Writer, x: Value, power: float) -> Value:
    if power in (0.5, -0.5):
        root = w("sqrt", x)
        return root if power > 0 else w("div", 1.0, root)
    if power != int(power) or not 1 <= abs(power) <= 8:
        raise CannotLower("aten.pow.Tensor_Scalar", f"exponent {power}")
    found = x
    for _ in range(abs(int(power)) - 1):
        found = w("mul", found, x)
    return found if power > 0 else w("div", 1.0, found)


def _plain(op: str) -> _Lowering:
    return lambda w, x: w(op, x)


for _name in ("neg", "exp", "log", "sqrt", "abs", "tanh", "sigmoid", "erf", "expm1", "log1p"):
    _op(_name)(_plain(_name))


@_op("rsqrt")
def _rsqrt(w: Writer, x: Value) -> Value:
    return w("div", 1.0, w("sqrt", x))


@_op("silu")
def _silu(w: Writer, x: Value) -> Value:
    return w("mul", x, w("sigmoid", x))


@_op("gelu")
def _gelu(w: Writer, x: Value, approximate: str = "none") -> Value:
    half = w("mul", x, 0.5)
    if approximate == "none":
        inner = w("erf", w("mul", x, math.sqrt(0.5)))
    elif approximate == "tanh":
        cube = w("mul", w("mul", x, x), x)
        sum_ = w("add", x, w("mul", cube, 0.044715))
        inner = w("tanh", w("mul", sum_, math.sqrt(2 / math.pi)))
    else:
        raise CannotLower("aten.gelu.default", f"approximate={approximate!r}")
    return w("mul", half, w("add", inner, 1.0))


@_op("relu")
def _relu(w: Writer, x: Value) -> Value:
    return w("where", w("le", x, 0.0), 0.0, x)


@_op("leaky_relu")
def _leaky_relu(w: Writer, x: Value, slope: float = 0.01) -> Value:
    return w("where", w("gt", x, 0.0), x, w("mul", x, float(slope)))


@_op("elu")
def _elu(w: Writer, x: Value, alpha: float = 1, scale: float = 1, inner: float = 1) -> Value:
    above = w("gt", x, 0.0)
    low = w("where", above, 0.0, x)  # an infinity in the branch not taken would make NaN gradients
    below = w("mul", w("expm1", w("mul", low, float(inner))), float(alpha) * float(scale))
    return w("where", above, w("mul", x, float(scale)), below)


@_op("softplus")
def _softplus(w: Writer, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    scaled = w("mul", x, float(beta))
    straight = w("gt", scaled, float(threshold))
    low = w("where", straight, 0.0, scaled)
    return w("where", straight, x, w("div", w("log1p", w("exp", low)), float(beta)))


@_op("mish")
def _mish(w: Writer, x: Value) -> Value:
    return w("mul", x, w("tanh", _softplus(w, x)))


@_op("clamp")
def _clamp(w: Writer, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    if low is not None:
        x = w("where", w("lt", x, low), low, x)
    if high is not None:
        x = w("where", w("gt", x, high), high, x)
    return x


@_op("clamp_min")
def _clamp_min(w: Writer, x: Value, low: Value) -> Value:
    return _clamp(w, x, low)


@_op("clamp_max")
def _clamp_max(w: Writer, x: Value, high: Value) -> Value:
    return _clamp(w, x, None, high)


@_op("hardtanh")
def _hardtanh(w: Writer, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    inside = w("where", w("le", x, low), low, x)  # no gradient at the ends, unlike clamp
    return w("where", w("ge", x, high), high, inside)


@_op("relu6")
def _relu6(w: Writer, x: Value) -> Value:
    return _hardtanh(w, x, 0.0, 6.0)


@_op("hardsigmoid")
def _hardsigmoid(w: Writer, x: Value) -> Value:
    return w("div", _hardtanh(w, w("add", x, 3.0), 0.0, 6.0), 6.0)


@_op("hardswish")
def _hardswish(w: Writer, x: Value) -> Value:
    return w("mul", x, _hardsigmoid(w, x))


@_op("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(w: Writer, condition: Value, x: Value, y: Value) -> Value:
    return w("where", condition, x, y)


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _compare: _Lowering = lambda w, x, y, op=_name: w(op, x, y)  # noqa: E731
    _op(f"{_name}.Tensor", f"{_name}.Scalar")(_compare)


@_op("logical_not", "bitwise_not")
def _not(w: Writer, x: Value) -> Value:
    return w("not", x)


@_op("logical_and", "bitwise_and.Tensor")
def _and(w: Writer, x: Value, y: Value) -> Value:
    return w("and", x, y)


@_op("logical_or", "bitwise_or.Tensor")
def _or(w: Writer, x: Value, y: Value) -> Value:
    return w("or", x, y)
