"""Dense products of a few tokens in C: the projections of a model that nothing routes.

While a token is decoded, a dense projection reads each weight once for two operations, so it takes
as long as reading takes. torch's product of one row reads at a third to a half of what memory gives
(Zen 4, two threads, 576 x 576 to 49152 x 576: 11 to 18 GB/s of 40); ``dots.c``, which routed rows
use, at most of it. For every size both are timed once per machine, at one to eight tokens, and the
C product is taken up to as many tokens as it is faster for.

This speeds up dense models as well: a comparison of a routed model with a dense one has to give
both the same (``sparsify bench`` and benchmarks/decode.py do).
"""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.codegen.cpu import build
from sparsify.codegen.cpu.call import DTYPES, FEW, Lowered, address, checked, function
from sparsify.codegen.cpu.choice import MARGIN, TOKENS
from sparsify.codegen.cpu.tune import here, timed
from sparsify.codegen.store import store
from sparsify.probe import attribute

VERSION = 1  # of the kernel: a new one is measured anew
linear = torch.nn.functional.linear
Size = tuple[int, int, torch.dtype]  # out, in


class Product(ctypes.Structure):
    """``product`` of dots.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "y")),
        ("out", ctypes.c_int64),
    ]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One weight: where it lies, and up to how many tokens C multiplies it."""

    place: int
    bias: int
    inputs: int
    outputs: int
    most: int
    dtype: torch.dtype
    alive: Any  # a weak reference to the weight


class Products(Lowered):
    """``linear(x, weight, bias)`` for decoding; anything else goes to torch.

    Args:
        limits: per size, up to how many tokens C is faster.
    """

    def __init__(self, limits: dict[Size, int]) -> None:
        self.limits = limits
        self.run = {
            dtype: function("dots", "products", dtype, "plplli")
            for dtype in {size[2] for size, most in limits.items() if most}
        }
        self.forget()

    def forget(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._spare: dict[int, list[Any]] = {}  # arrays of C products, by their number

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
        found = self._in_c(x, (weight,), (bias,))
        return linear(x, weight, bias) if found is None else found[0]

    def several(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The products of x (..., in) with each weight (out, in), in one C call where C is taken
        for them all."""
        found = self._in_c(x, weights, biases)
        if found is None:
            found = [self(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return found

    def _in_c(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> list[Tensor] | None:
        if not x.is_contiguous():
            return None
        inputs, leading, dtype, tokens = x.shape[-1], x.shape[:-1], x.dtype, 0
        spare = self._spare.setdefault(len(weights), [])
        try:
            calls = spare.pop()  # nobody else's meanwhile
        except IndexError:
            calls = (Product * len(weights))()
        found = []
        for call, weight, bias in zip(calls, weights, biases, strict=True):
            entry = self._entries.get(id(weight))
            place, shift = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
            if entry is None or entry.place != place or entry.bias != shift:
                entry = self._entry(weight, bias)
            if not entry.most or entry.inputs != inputs or entry.dtype is not dtype:
                return None
            tokens = tokens or x.numel() // inputs
            if not 0 < tokens <= entry.most:
                return None
            y = x.new_empty((*leading, entry.outputs))
            call.weight, call.bias, call.y, call.out = place, shift, y.data_ptr(), entry.outputs
            found.append(y)
        run = self.run[dtype]
        checked(run(calls, len(weights), x.data_ptr(), tokens, inputs, build.threads()))
        spare.append(calls)
        return found

    def _entry(self, weight: Tensor, bias: Tensor | None) -> _Entry:
        outputs, inputs = weight.shape
        plain = weight.is_contiguous() and weight.is_cpu
        if bias is not None:
            plain = plain and bias.is_contiguous() and bias.dtype is weight.dtype
        most = self.limits.get((outputs, inputs, weight.dtype), 0) if plain else 0
        key, entries = id(weight), self._entries
        alive = weakref.ref(weight, lambda _: entries.pop(key, None))
        entry = entries[key] = _Entry(
            weight.data_ptr(), address(bias), inputs, outputs, most, weight.dtype, alive
        )
        return entry


def weights_of(graph: fx.GraphModule) -> dict[Size, list[Tensor]]:
    """The weights of ``aten.linear`` that kernels can read, by size, each once."""
    found: dict[Size, dict[int, Tensor]] = {}
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.linear.default:
            continue
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        tensor = attribute(graph, str(weight.target))
        if isinstance(tensor, Tensor) and tensor.dtype in DTYPES and tensor.is_cpu:
            outputs, inputs = tensor.shape
            found.setdefault((outputs, inputs, tensor.dtype), {})[id(tensor)] = tensor
    return {size: list(tensors.values()) for size, tensors in found.items()}


def products_of(graph: fx.GraphModule) -> tuple[Products | None, str]:
    """What multiplies the dense weights of ``graph``, and what was found, for the remark.

    Raises:
        NoCompiler, BuildFailed: of the C compiler.
    """
    weights = weights_of(graph)
    limits = {size: _limit(size, tensors) for size, tensors in weights.items()}
    used = [
        f"{outputs} x {inputs} up to {most} tokens"
        for (outputs, inputs, _), most in limits.items()
        if most
    ]
    if not used:
        return None, "torch's products are faster here"
    return Products(limits), f"C product of dense weights: {', '.join(used)}"


def _limit(size: Size, weights: Sequence[Tensor]) -> int:
    outputs, inputs, dtype = size
    name = str(dtype).removeprefix("torch.")
    key = f"product-{VERSION}-{outputs}x{inputs}-{name}-{here()}"
    return int(store().json(key, lambda: _measured(size, weights)))


def _measured(size: Size, weights: Sequence[Tensor]) -> int:
    """Up to how many tokens C is faster, from the first number on; weights take turns."""
    trial = Products({size: FEW})
    most = 0
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, size[1]).to(size[2])
            ours, theirs = (timed(_turns(call, x, weights)) for call in (trial, linear))
            if ours * MARGIN > theirs:
                break
            most = tokens
    return most


def _turns(call: Callable[..., Tensor], x: Tensor, weights: Sequence[Tensor]) -> Any:
    return lambda n: call(x, weights[n % len(weights)])
