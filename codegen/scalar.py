"""Scalar steps that elementwise programs are lowered to, and their derivatives.

A value is a name (an input or an earlier step) or a constant. Steps are in single-assignment form;
equal steps are written once.
"""

from __future__ import annotations

import dataclasses
import math

Value = str | float

CONDITIONS = ("lt", "le", "gt", "ge", "eq", "ne", "not", "and", "or")
_LOGIC = ("not", "and", "or")


class CannotLower(Exception):
    """A program cannot be written as scalar code.

    Attributes:
        op: the operation in the way.
    """

    def __init__(self, op: str, why: str = "") -> None:
        super().__init__(f"{op} has no scalar code" + (f" ({why})" if why else ""))
        self.op = op


@dataclasses.dataclass(frozen=True)
class Let:
    """``name = op(*args)``."""

    name: str
    op: str
    args: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Scalar:
    """``lets`` applied to ``inputs``; the values ``outputs`` are the results."""

    inputs: tuple[str, ...]
    lets: tuple[Let, ...]
    outputs: tuple[Value, ...]


class Writer:
    """Writes steps: ``w("add", x, y)`` is the value of a new step, or of an equal earlier one."""

    def __init__(self, inputs: tuple[str, ...], steps: tuple[Let, ...] = ()) -> None:
        self.steps = list(steps)
        self.known: dict[tuple[str, tuple[Value, ...]], str] = {}
        self.conditions: set[str] = set()
        self.taken = set(inputs)
        for step in steps:
            self._note(step)

    def _note(self, step: Let) -> None:
        self.known[step.op, step.args] = step.name
        self.taken.add(step.name)
        if step.op in CONDITIONS:
            self.conditions.add(step.name)

    def __call__(self, op: str, *args: Value) -> Value:
        takes = self._kinds(op, args)
        for arg, condition in zip(args, takes, strict=True):
            if (arg in self.conditions) != condition:
                raise CannotLower(op, "a condition as a number, or a number as a condition")
        given = tuple(float(a) if isinstance(a, int | float) else a for a in args)
        if (op, given) not in self.known:
            name = next(n for i in range(10**6) if (n := f"v{i}") not in self.taken)
            step = Let(name, op, given)
            self.steps.append(step)
            self._note(step)
        return self.known[op, given]

    def _kinds(self, op: str, args: tuple[Value, ...]) -> tuple[bool, ...]:
        if op == "where":
            return (True, False, False)
        return (op in _LOGIC,) * len(args)

    def number(self, value: Value) -> Value:
        """``value``, which has to be a number."""
        if value in self.conditions:
            raise CannotLower("bool", "a condition used as a number")
        return float(value) if isinstance(value, int | float) else value

    # -- what derivatives are made of: constants fold, so that unused terms vanish

    def add(self, x: Value, y: Value) -> Value:
        if x == 0.0:
            return y
        return x if y == 0.0 else self("add", x, y)

    def mul(self, x: Value, y: Value) -> Value:
        if x == 0.0 or y == 0.0:
            return 0.0
        if x == 1.0:
            return y
        return x if y == 1.0 else self("mul", x, y)

    def pick(self, condition: Value, x: Value, y: Value) -> Value:
        return x if x == y else self("where", condition, x, y)


class Gradient:
    """Reverse-mode derivatives of a scalar program's only output."""

    def __init__(self, scalar: Scalar) -> None:
        if "grad" in scalar.inputs:
            raise CannotLower("gradient", "an input is called 'grad'")
        self.of = scalar
        self.inputs = (*scalar.inputs, "grad")
        self.w = Writer(self.inputs, scalar.lets)
        self.sums: dict[Value, Value] = {}

    def scalar(self) -> Scalar:
        """(inputs, grad) -> value, then one gradient per input."""
        self._give(self.of.outputs[0], "grad")
        for let in reversed(self.of.lets):
            total = self.sums.get(let.name, 0.0)
            if total != 0.0:
                self._step(let, total)
        found = tuple(self.sums.get(i, 0.0) for i in self.of.inputs)
        return Scalar(self.inputs, tuple(self.w.steps), (*self.of.outputs, *found))

    def _give(self, to: Value, amount: Value) -> None:
        if isinstance(to, str):
            self.sums[to] = self.w.add(self.sums.get(to, 0.0), amount)

    def _step(self, let: Let, g: Value) -> None:
        w, give, x, y = self.w, self._give, let.args[0], let.args[-1]
        out: Value = let.name
        if let.op == "add":
            give(x, g)
            give(y, g)
        elif let.op == "sub":
            give(x, g)
            give(y, w("neg", g))
        elif let.op == "mul":
            give(x, w.mul(g, y))
            give(y, w.mul(g, x))
        elif let.op == "div":
            share = w("div", g, y)
            give(x, share)
            if isinstance(y, str):
                give(y, w("neg", w.mul(share, out)))
        elif let.op == "where":
            _, yes, no = let.args
            give(yes, w.pick(x, g, 0.0))
            give(no, w.pick(x, 0.0, g))
        elif let.op in ("max", "min"):
            # ATen shares the gradient of a tie.
            first, second = ("gt", "lt") if let.op == "max" else ("lt", "gt")
            half = w.mul(g, 0.5)
            give(x, w.pick(w(first, x, y), g, w.pick(w(second, x, y), 0.0, half)))
            give(y, w.pick(w(first, x, y), 0.0, w.pick(w(second, x, y), g, half)))
        elif let.op not in CONDITIONS:
            give(x, self._unary(let.op, x, out, g))

    def _unary(self, op: str, x: Value, out: Value, g: Value) -> Value:
        w = self.w
        if op == "neg":
            return w("neg", g)
        if op == "exp":
            return w.mul(g, out)
        if op == "expm1":
            return w.mul(g, w("add", out, 1.0))
        if op == "log":
            return w("div", g, x)
        if op == "log1p":
            return w("div", g, w("add", x, 1.0))
        if op == "sqrt":
            return w("div", w.mul(g, 0.5), out)
        if op == "abs":
            sign = w.pick(w("gt", x, 0.0), g, w.pick(w("lt", x, 0.0), w("neg", g), 0.0))
            return sign
        if op == "tanh":
            return w.mul(g, w("sub", 1.0, w("mul", out, out)))
        if op == "sigmoid":
            return w.mul(g, w("mul", out, w("sub", 1.0, out)))
        if op == "erf":
            bell = w("exp", w("neg", w("mul", x, x)))
            return w.mul(g, w("mul", bell, 2 / math.sqrt(math.pi)))
        if op in ("round_f16", "round_bf16"):
            return w(op, g)  # ATen casts the gradient back
        raise CannotLower(op, "its derivative is not known")
