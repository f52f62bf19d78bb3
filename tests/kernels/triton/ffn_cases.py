"""Random routed feed-forward layers, their value and gradients in float64, and float32's bounds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsify.codegen.elementwise import lower_gradient
from sparsify.codegen.triton.activation import key_of
from sparsify.codegen.triton.ffn_ops import routed_ffn
from sparsify.runtime.program import Program
from tests.kernels.activations import EPS, further_programs, value_and_bound, zoo_programs

NAMES = ("x", "select", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")
KINDS = ("random", "empty expert", "one expert", "nothing", "everything", "top-k")


@dataclasses.dataclass
class Case:
    """Arguments of the operator, float32, those of NAMES in order (None = absent)."""

    tensors: tuple[Tensor | None, ...]
    activation: Program
    keep: int
    label: str

    @staticmethod
    def draw(seed: int, largest: int = 80) -> Case:
        """Sizes that tiles do not divide, and selections of every kind."""
        g = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=g))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        programs = {**zoo_programs(), **further_programs()}
        for rounds in ("cast", "half"):  # half a float16 step is no rounding of float32
            programs.pop(rounds)
        names = sorted(programs)
        name = names[seed % len(names)]
        gated = len(programs[name].inputs) == 2
        tokens = (1, number(2, 16), number(17, largest))[seed % 3]
        n, m, d = number(1, 7), number(1, 40), number(1, 50)
        kind = KINDS[number(0, len(KINDS) - 1)]
        select = torch.where(torch.rand(tokens, n, generator=g) < 0.5, normal(tokens, n), 0.0)
        keep = n
        if kind == "empty expert":
            select[:, number(0, n - 1)] = 0
        elif kind == "one expert":
            select = torch.zeros(tokens, n).index_fill_(1, torch.tensor([number(0, n - 1)]), 1.0)
            keep = 1
        elif kind == "nothing":
            select.zero_()
        elif kind == "everything":
            select = torch.ones(tokens, n)
        elif kind == "top-k":
            keep = number(1, n)
            best = normal(tokens, n).topk(keep).indices
            select = torch.zeros(tokens, n).scatter_(1, best, 1.0)
        biased = number(0, 1)
        x = normal(tokens, d)
        layout = number(0, 2)
        if layout == 1:  # every other row of a wider matrix
            x = normal(2 * tokens, d + 3)[::2, 1 : d + 1]
        elif layout == 2:
            x = normal(d, tokens).t()
        tensors = (
            x,
            select,
            normal(n, m, d) / d**0.5,
            normal(n, m, d) / d**0.5 if gated else None,
            normal(n, m, d) / m**0.5,
            normal(n, m) if biased else None,
            normal(n, m) if gated and biased else None,
            normal(d) if number(0, 1) else None,
        )
        return Case(tensors, programs[name], keep, f"{seed}: {kind} {tokens}x{n}x{m}x{d} {name}")

    def check(self, gradients: bool = True) -> None:
        """The operator against float64, within the bound on float32."""
        given = [None if t is None else t.detach().requires_grad_(gradients) for t in self.tensors]
        y = routed_ffn(*given, key_of(self.activation), self.keep)
        g = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=g)
        expected = bounds(self.tensors, self.activation, dy)
        assert y.dtype == torch.float32
        close("y", y.detach(), *expected["y"], self.label)
        if gradients:
            y.backward(dy)
            for name, tensor in zip(NAMES, given, strict=True):
                if tensor is not None:
                    assert tensor.grad is not None
                    close(name, tensor.grad, *expected[name], self.label)


def close(name: str, found: Tensor, wanted: Tensor, bound: Tensor, label: str) -> None:
    assert found.shape == wanted.shape == bound.shape
    assert not bound.isnan().any(), f"{label}: {name} has no bound in {int(bound.isnan().sum())}"
    far = (found.double() - wanted).abs() - bound
    assert (far <= 0).all(), f"{label}: {name} is {far.max():.3g} past its bound"


def bounds(
    tensors: tuple[Tensor | None, ...], activation: Program, dy: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Value and gradients in float64, each with the most that float32 may differ.

    A product of length n in float32, in any order, differs by at most ``g(n) * |a| |b|``, with
    ``g(n) = n u / (1 - n u)`` and u the unit roundoff (Higham, Accuracy and Stability of Numerical
    Algorithms, 3.1), and passes on the errors of its arguments; the activation's error is
    :func:`value_and_bound`'s. Second-order terms are covered by two more roundings per sum.
    """
    x, select, up, gate, down, up_bias, gate_bias, down_bias = (
        None if t is None else t.detach().double() for t in tensors
    )
    assert x is not None and select is not None and up is not None and down is not None
    e = dy.double()
    tokens, (n, m, d) = len(x), up.shape

    def g(length: int) -> float:
        return (length + 2) * EPS / (1 - (length + 2) * EPS)

    def sums(w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        value = torch.einsum("td,nmd->tnm", x, w)
        size = torch.einsum("td,nmd->tnm", x.abs(), w.abs())
        if bias is not None:
            value, size = value + bias, size + bias.abs()
        return value, g(d + 1) * size

    first = [sums(up, up_bias)] + ([] if gate is None else [sums(gate, gate_bias)])
    dh = torch.einsum("td,nmd->tnm", e, down)
    dh_error = g(d) * torch.einsum("td,nmd->tnm", e.abs(), down.abs())
    weight = select[:, :, None]
    grad, grad_error = dh * weight, (dh_error + EPS * dh.abs()) * weight.abs()
    scalar = lower_gradient(activation)
    found = value_and_bound(
        scalar, *[v for v, _ in first], grad, errors=(*[b for _, b in first], grad_error)
    )
    # Chosen, not multiplied by zero: the bound on a dead pair's neuron may be infinite.
    live, dead = weight != 0, torch.zeros((), dtype=torch.float64)
    (h, h_error), *slopes = [(v.where(live, dead), b.where(live, dead)) for v, b in found]
    wide = 1.0 + 1e-6  # errors times errors

    def pairs(eq: str, *terms: tuple[Tensor, Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
        value = sum(torch.einsum(eq, a, b) for a, _, b in terms)
        error = sum(torch.einsum(eq, g(length) * a.abs() + da, b.abs()) for a, da, b in terms)
        assert isinstance(value, Tensor) and isinstance(error, Tensor)
        return value, wide * error

    hw, hw_error = h * weight, (h_error + EPS * h.abs()) * weight.abs()
    out: dict[str, tuple[Tensor, Tensor]] = {}
    y, y_error = pairs("tnm,nmd->td", (hw, hw_error, down), length=n * (m + 2) + 1)
    bias = torch.zeros(d, dtype=torch.float64) if down_bias is None else down_bias
    out["y"] = y + bias, y_error + g(n + 1) * bias.abs()
    (da, da_error), *rest = slopes
    terms = [(da, da_error, up)]
    if gate is not None:
        db, db_error = rest[0]
        terms.append((db, db_error, gate))
        out["gate"] = pairs("tnm,td->nmd", (db, db_error, x), length=tokens)
        ones = torch.ones_like(x[:, 0])
        out["gate_bias"] = pairs("tnm,t->nm", (db, db_error, ones), length=tokens)
    out["x"] = pairs("tnm,nmd->td", *terms, length=n * (2 * m + 2))
    out["up"] = pairs("tnm,td->nmd", (da, da_error, x), length=tokens)
    out["up_bias"] = pairs("tnm,t->nm", (da, da_error, torch.ones_like(x[:, 0])), length=tokens)
    out["down"] = pairs("tnm,td->nmd", (hw, hw_error, e), length=tokens)
    out["down_bias"] = e.sum(0), g(tokens) * e.abs().sum(0)
    each = g(m) * (h * dh).abs() + h_error * dh.abs() + h.abs() * dh_error + h_error * dh_error
    out["select"] = (h * dh).sum(2), wide * each.sum(2)
    return out
