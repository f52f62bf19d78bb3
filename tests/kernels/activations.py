"""Activation programs for tests of scalar code, and a bound on what float32 makes of them."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from sparsify.codegen.scalar import Scalar
from sparsify.runtime.program import Program, Ref, Step
from tests.conftest import GOLDEN

FILE = "kernels/activations.json"  # of the zoo's feed-forward layers: see test_elementwise


def zoo_programs() -> dict[str, Program]:
    """The different activations of all zoo models, as captured, by name."""
    return {k: Program.from_json(v) for k, v in json.loads((GOLDEN / FILE).read_text()).items()}


def _one(op: str, *args: object, **kwargs: object) -> Program:
    return Program(("up",), (Step("y", op, (Ref("up"), *args), kwargs),), "y")


def further_programs() -> dict[str, Program]:
    """What other models use."""
    up, gate = Ref("up"), Ref("gate")
    wide = (
        Step("w", "aten._to_copy.default", (gate,), {"dtype": torch.float32}),
        Step("g", "aten.gelu.default", (Ref("w"),)),
        Step("n", "aten._to_copy.default", (Ref("g"),), {"dtype": torch.bfloat16}),
        Step("y", "aten.mul.Tensor", (Ref("n"), up)),
    )
    quick = (
        Step("m", "aten.mul.Tensor", (up, 1.702)),
        Step("s", "aten.sigmoid.default", (Ref("m"),)),
        Step("y", "aten.mul.Tensor", (up, Ref("s"))),
    )
    capped = (
        Step("g", "aten.clamp.default", (gate, None, 7.0)),
        Step("u", "aten.clamp.default", (up, -7.0, 7.0)),
        Step("m", "aten.mul.Tensor", (Ref("g"), 1.702)),
        Step("s", "aten.sigmoid.default", (Ref("m"),)),
        Step("h", "aten.mul.Tensor", (Ref("g"), Ref("s"))),
        Step("o", "aten.add.Tensor", (Ref("u"), 1)),
        Step("y", "aten.mul.Tensor", (Ref("o"), Ref("h"))),
    )
    chosen = (
        Step("c", "aten.gt.Tensor", (up, gate)),
        Step("b", "aten.lt.Scalar", (up, 2.0)),
        Step("d", "aten.logical_and.default", (Ref("c"), Ref("b"))),
        Step("r", "aten.rsub.Scalar", (gate, 2.0, 3.0)),
        Step("y", "aten.where.self", (Ref("d"), up, Ref("r"))),
    )
    extremes = (
        Step("a", "aten.maximum.default", (up, gate)),
        Step("b", "aten.minimum.default", (up, gate)),
        Step("c", "aten.sub.Tensor", (Ref("a"), Ref("b")), {"alpha": 0.5}),
        Step("d", "aten.abs.default", (up,)),
        Step("e", "aten.add.Tensor", (Ref("d"), 1.0)),
        Step("y", "aten.div.Tensor", (Ref("c"), Ref("e"))),
    )
    squared = (
        Step("r", "aten.relu.default", (up,)),
        Step("y", "aten.pow.Tensor_Scalar", (Ref("r"), 2)),
    )
    gated, both = ("up", "gate"), ("up",)
    return {
        "cast": Program(gated, wide, "y"),
        "quick": Program(both, quick, "y"),
        "capped": Program(gated, capped, "y"),
        "chosen": Program(gated, chosen, "y"),
        "extremes": Program(gated, extremes, "y"),
        "squared": Program(both, squared, "y"),
        "half": _one("aten._to_copy.default", dtype=torch.float16),
        "identity": Program.identity("up"),
        "tanh": _one("aten.tanh.default"),
        "sigmoid": _one("aten.sigmoid.default"),
        "elu": _one("aten.elu.default", 0.7),
        "softplus": _one("aten.softplus.default", 2.0),
        "mish": _one("aten.mish.default"),
        "hardswish": _one("aten.hardswish.default"),
        "hardsigmoid": _one("aten.hardsigmoid.default"),
        "leaky": _one("aten.leaky_relu.default", 0.1),
        "relu6": _one("aten.relu6.default"),
        "cube": _one("aten.pow.Tensor_Scalar", -3),
    }


def grid(program: Program, points: int = 61) -> tuple[Tensor, ...]:
    """Float32 inputs: all combinations of values about zero, small and large ones."""
    values = torch.linspace(-11, 11, points)
    values = torch.cat([values, torch.tensor([0.0, 1e-4, -1e-6, 7.0, -7.0, 3e-2, 30.0, -90.0])])
    return tuple(
        t.flatten() for t in torch.meshgrid(*[values] * len(program.inputs), indexing="ij")
    )


EPS = 2.0**-24  # unit roundoff of float32
# Roundings of one step, in units of EPS: 1 for what IEEE rounds correctly; Triton's exp is the
# hardware's 2 ** (x * log2(e)), two roundings more, whose effect grows with the exponent: `_exp`.
_ROUNDINGS = {"tanh": 8, "erf": 4, "sigmoid": 4, "expm1": 8, "log1p": 8, "log": 2, "exp": 4}


def value_and_bound(
    scalar: Scalar, *inputs: Tensor, errors: tuple[Tensor, ...] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Each output in float64, and how far float32 may be from it.

    Running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 3.3): a step
    adds its roundings times its value, and passes on its arguments' errors times its derivatives.
    A condition whose sides are nearer than their errors may go either way. An infinite bound says
    that float32 may give anything (a divisor that may be zero); one that is NaN would say nothing
    and compare as nobody expects: AssertionError.
    """
    known: dict[str, tuple[Tensor, Tensor]] = {}
    zero = tuple(torch.zeros_like(x, dtype=torch.float64) for x in inputs)
    for name, x, error in zip(scalar.inputs, inputs, errors or zero, strict=True):
        known[name] = (x.double(), error)

    def get(v: str | float) -> tuple[Tensor, Tensor]:
        if isinstance(v, str):
            return known[v]
        like = inputs[0].double()
        return torch.full_like(like, v), torch.full_like(like, abs(v) * EPS if v % 1 else 0.0)

    for let in scalar.lets:
        value, bound = known[let.name] = _bounded(let.op, *[get(a) for a in let.args])
        lost = bound.isnan() & ~value.isnan()
        assert not lost.any(), f"no bound on {let.op} in {int(lost.sum())} places"
    return [get(o) for o in scalar.outputs]


def _times(size: Tensor, error: Tensor) -> Tensor:
    """``size * error``; infinite where either is: zero times anything at all is no bound."""
    return torch.where(size.isinf() | error.isinf(), torch.inf, size * error)


def _bounded(op: str, *args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (x, dx), (y, dy) = args[0], args[-1]
    if op in ("lt", "le", "gt", "ge", "eq", "ne"):
        return getattr(torch, op)(x, y), torch.where((x - y).abs() <= dx + dy, dx + dy, 0.0)
    if op in ("not", "and", "or"):
        out = {"not": lambda: ~x, "and": lambda: x & y, "or": lambda: x | y}[op]()
        return out, dx + dy
    if op == "where":
        (a, da), (b, db) = args[1:]
        either = (a - b).abs() + torch.maximum(da, db)
        return torch.where(x, a, b), torch.where(dx > 0, either, torch.where(x, da, db))
    if op in ("max", "min"):
        return getattr(torch, f"{op}imum")(x, y), torch.maximum(dx, dy)
    if op in ("round_f16", "round_bf16"):
        dtype = torch.float16 if op == "round_f16" else torch.bfloat16
        out = x.to(torch.float32).to(dtype).double()
        step = torch.finfo(dtype).eps * out.abs() + torch.finfo(dtype).tiny
        return out, torch.where(dx > 0, dx + step, 0.0)
    if op in ("add", "sub"):
        out, error = getattr(torch, op)(x, y), dx + dy
    elif op == "mul":
        out, error = x * y, _times(x.abs(), dy) + _times(y.abs(), dx) + _times(dx, dy)
    elif op == "div":
        out = x / y
        least = (y.abs() - dy).clamp_min(0)
        error = torch.where(least > 0, (dx + _times(out.abs(), dy)) / least, torch.inf)
    elif op == "exp":
        out = x.exp()
        error = out * torch.expm1(dx + 2 * EPS * x.abs())
    else:
        out = {
            "neg": torch.neg, "abs": torch.abs, "log": torch.log, "sqrt": torch.sqrt,
            "tanh": torch.tanh, "erf": torch.erf, "sigmoid": torch.sigmoid, "log1p": torch.log1p,
            "expm1": torch.expm1,
        }[op](x)  # fmt: skip
        slope = {
            "neg": 1.0, "abs": 1.0, "log": 1 / x, "sqrt": 0.5 / out,
            "tanh": 1 - (x.abs() - dx).clamp_min(0).tanh() ** 2,
            "erf": 2 / math.sqrt(math.pi), "sigmoid": 0.25, "log1p": 1 / (1 + x),
            "expm1": (x + dx).exp(),
        }[op]  # fmt: skip
        error = dx * slope
        if op == "sigmoid":  # 1 / (1 + exp(-x)): exp's error weighs x
            error = error + 2 * EPS * x.abs() * out * (1 - out)
    tiny = torch.finfo(torch.float32).tiny
    return out, error + _ROUNDINGS.get(op, 2) * EPS * out.abs() + tiny
