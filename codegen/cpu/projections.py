"""Projections of one input that C computes in one call, and what is known of them between calls."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.codegen.cpu.build import threads
from sparsify.codegen.cpu.call import checked, version
from sparsify.runtime.changes import Changes

if TYPE_CHECKING:
    from sparsify.runtime.counters import Counter
    from sparsify.runtime.inputs import RoutedLinear


class Projection(ctypes.Structure):
    """``projection`` of rows.c: one of those that read the same x."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("to", "y")),
        *(("keep", ctypes.c_int64), ("counts", ctypes.c_void_p)),
        ("threshold", ctypes.c_float),
    ]


@dataclasses.dataclass(slots=True)
class Group:
    """Projections of an x of one shape, ready to be called again.

    While a token is decoded, all that is looked at was last looked at before all other weights came
    through the caches, so little is: the count of changes, and the place of every parameter, which
    may get other data (or be swapped, as ``torch.func.functional_call`` does) uncounted.

    Attributes:
        changes: the count for which this holds.
        shapes: of the results.
        copies: tensors that C reads copies of, and how often they had changed.
        dense: the one module's dense way is faster.
        run: the C function.
        calls: what it is given, but for ``y``; copied for every call that runs at the same time.
    """

    changes: int
    modules: tuple[RoutedLinear, ...]
    shape: torch.Size
    tokens: int
    shapes: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[Tensor, int], ...]
    dense: bool
    run: Any
    calls: Any
    structs: tuple[Any, ...]  # which calls point to
    counters: tuple[Counter, ...] = ()
    spare: list[Any] = dataclasses.field(default_factory=list)
    places: tuple[tuple[dict[str, Any], str, Tensor, int], ...] = ()
    kept: tuple[Tensor, ...] = ()  # buffers, whose memory C reads

    def __post_init__(self) -> None:
        self.counters = tuple(module.counter for module in self.modules)
        for call, counter in zip(self.calls, self.counters, strict=True):
            call.counts = counter.numbers.buffer_info()[0]
        self.places = tuple(
            (module._parameters, name, tensor, tensor.data_ptr())
            for module in self.modules
            for name, tensor in module._parameters.items()
            if tensor is not None
        )
        self.kept = tuple(b.detach() for m in self.modules for b in m.select.buffers())

    def holds(self, modules: Sequence[RoutedLinear], shape: torch.Size) -> bool:
        """Whether nothing has changed since."""
        if self.changes != Changes.count or self.shape != shape or self.modules != tuple(modules):
            return False
        for parameters, name, tensor, place in self.places:
            if parameters[name] is not tensor or tensor.data_ptr() != place:
                return False
        return all(version(tensor) == seen for tensor, seen in self.copies)

    def compute(self, x: Tensor) -> list[Tensor]:
        """What the modules make of x (..., in), of this group's shape and contiguous."""
        try:
            calls = self.spare.pop()  # nobody else's meanwhile
        except IndexError:
            calls = type(self.calls).from_buffer_copy(self.calls)
        found = [x.new_empty(shape) for shape in self.shapes]
        for call, y in zip(calls, found, strict=True):
            call.y = y.data_ptr()
        checked(self.run(calls, len(found), x.data_ptr(), self.tokens, threads()))
        self.spare.append(calls)
        return found
