"""Which CPU kernel a routed module gets.

Depth routing (:class:`sparsify.runtime.depth.RoutedLayer`) has none: it gathers live tokens around
a whole layer, which costs torch a few microseconds per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsify.codegen.cpu.attend import AttendKernel
from sparsify.codegen.cpu.heads import ColumnsKernel, RowsKernel
from sparsify.codegen.cpu.linear import LinearKernel
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.hidden import HiddenColumns
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.spec import RoutedModule


def kernel_of(module: RoutedModule) -> Callable[..., Any]:
    """The kernel for ``module``; Refused where there is none, NoCompiler, BuildFailed."""
    kind = type(module)  # a subclass may compute something else
    if kind is RoutedLinear and isinstance(module, RoutedLinear):
        return LinearKernel(module)
    if kind is RoutedRows and isinstance(module, RoutedRows):
        return RowsKernel(module)
    # what mixes the outputs of HiddenColumns does so after the kernel
    if kind in (RoutedColumns, HiddenColumns) and isinstance(module, RoutedColumns):
        return ColumnsKernel(module)
    if kind is RoutedAttend and isinstance(module, RoutedAttend):
        return AttendKernel(module)
    raise Refused(f"there is no CPU kernel for {kind.__name__}")
