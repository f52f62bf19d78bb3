"""Bytes that an operator moves, counted from what its kernels load and store in the interpreter.

Two counts. ``moved`` is what has to come from and go to memory: the distinct 32-byte sectors that a
launch touches, reads and writes apart, summed over launches (what is read again within a launch is
in the cache; what one launch leaves for the next is counted twice, written and read). Eager
operations between launches count as launches that read their arguments and write their results.
``issued`` is every access of every program, what the cache has to serve.

What ``moved`` is held against is said by a :class:`Sample`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SECTOR = 32  # bytes: the least that a GPU's memory delivers
MOST = 1.1  # times the least: what is accepted


@dataclasses.dataclass(frozen=True)
class Sample:
    """An operator on inputs of a telling size, and the least that it could move.

    Attributes:
        run: the operator, ready to run; nothing else is launched.
        least: bytes: every live weight, every input and every output once. No index list, no
            partial sum, nothing dead, nothing in between.
        between: bytes that one launch writes and another reads, each counted once, where the
            operator cannot do without: the neurons of the live pairs, between two products that
            cannot be one since each needs all of the other's width.
        own: kernel -> the least of all its launches: what each takes and gives, once each, of what
            is live. Kernels that are not named move lists or sums of parts only, or are all that
            the operator consists of.
        why: what is moved more than once, and why; empty where the operator stays within MOST.
    """

    run: Callable[[], Any]
    least: int
    between: int = 0
    own: Mapping[str, int] = dataclasses.field(default_factory=dict)
    why: str = ""


@dataclasses.dataclass
class Traffic:
    """What was counted; see the module's docstring. ``by`` kernel: its share of ``moved``."""

    moved: int = 0
    issued: int = 0
    launches: int = 0
    by: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    _reads: list[Any] = dataclasses.field(default_factory=list)
    _writes: list[Any] = dataclasses.field(default_factory=list)

    def _touch(self, kind: list[Any], pointers: Any, mask: Any) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
        at = at[np.broadcast_to(mask, at.shape)].astype(np.uint64)
        self.issued += int(at.size) * size
        kind.append(np.unique(at // np.uint64(SECTOR)))

    def _end(self, name: str) -> None:
        for kind in (self._reads, self._writes):
            if kind:
                self._add(name, len(np.unique(np.concatenate(kind))) * SECTOR)
            kind.clear()
        self.launches += 1

    def _add(self, name: str, amount: int) -> None:
        self.moved += amount
        self.by[name] += amount


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class _Eager(TorchDispatchMode):
    """Counts what eager operations read and write; looks into the operators of sparsify."""

    def __init__(self, found: Traffic) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sparsify":
            with self:
                return OPDEFS[func._name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        given, made = (_tensors(tree) for tree in ((args, kwargs), out))
        written = any(r.alias_info and r.alias_info.is_write for r in func._schema.returns)
        held = {t.untyped_storage().data_ptr() for t in given}
        view = not written and all(t.untyped_storage().data_ptr() in held for t in made)
        if not view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            amount = sum(t.numel() * t.element_size() for t in given + made)
            self.found.issued += amount
            self.found._add("eager", amount)
        return out


@contextlib.contextmanager
def count() -> Iterator[Traffic]:
    """Count what kernels and eager operations move inside the block; interpreter mode only."""
    from triton.runtime import interpreter

    found = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic, launch = builder.create_atomic_rmw, executor.__call__

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        found._touch(found._reads, ptrs, mask.data)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found._touch(found._writes, ptrs, mask.data)
        return store(self, ptrs, value, mask, *rest)

    def counted_atomic(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        found._touch(found._reads, ptr, mask.data)
        found._touch(found._writes, ptr, mask.data)
        return atomic(self, op, ptr, val, mask, *rest)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            result = launch(self, *args, **kwargs)
        found._end(self.fn.__name__)
        return result

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, executor.__call__ = counted_atomic, counted_launch
    try:
        with _Eager(found):
            yield found
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, executor.__call__ = atomic, launch
