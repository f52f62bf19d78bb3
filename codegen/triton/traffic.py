"""Bytes that kernels move, counted from the addresses they load and store in the interpreter.

Two counts. ``moved`` is what has to come from and go to memory: the distinct 32-byte sectors that a
launch touches, reads and writes apart, summed over launches (what is read again within a launch is
in the cache; what one launch leaves for the next is counted twice, written and read). ``issued`` is
every access of every program, what the cache has to serve.

The minimum that ``moved`` is held against is said by :attr:`KernelSpec.sample
<sparsify.codegen.triton.spec.KernelSpec>`: live weights, inputs and outputs, once each; no index
list, no partial sum, nothing dead, nothing in between.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

SECTOR = 32  # bytes: the least that a GPU's memory delivers


@dataclasses.dataclass
class Traffic:
    """What was counted; see the module's docstring."""

    moved: int = 0
    issued: int = 0
    launches: int = 0
    _reads: list[Any] = dataclasses.field(default_factory=list)
    _writes: list[Any] = dataclasses.field(default_factory=list)

    def _touch(self, kind: list[Any], pointers: Any, mask: Any) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
        at = at[np.broadcast_to(mask, at.shape)].astype(np.uint64)
        self.issued += int(at.size) * size
        kind.append(np.unique(at // np.uint64(SECTOR)))

    def _end(self) -> None:
        for kind in (self._reads, self._writes):
            if kind:
                self.moved += len(np.unique(np.concatenate(kind))) * SECTOR
            kind.clear()
        self.launches += 1


@contextlib.contextmanager
def count() -> Iterator[Traffic]:
    """Count what kernels move inside the block; interpreter mode only."""
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
        result = launch(self, *args, **kwargs)
        found._end()
        return result

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, executor.__call__ = counted_atomic, counted_launch
    try:
        yield found
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, executor.__call__ = atomic, launch
