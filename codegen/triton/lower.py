"""Which Triton kernel a routed module on a GPU gets."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.core import Refused
from sparsify.errors import MissingDependency
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.spec import Kernel, RoutedModule


def kernels_of(modules: Sequence[RoutedModule], *, int8: bool = False) -> tuple[list[Kernel], str]:
    """A kernel for each of ``modules``, which are alike, and what was built.

    Raises:
        Refused: there is none for that kind. MissingDependency: Triton is not installed.
    """
    if int8:
        raise Refused("int8 copies of weights are read by CPU kernels only")
    return [kernel_of(module) for module in modules], "Triton kernels, compiled at the first call"


def kernel_of(module: RoutedModule) -> Kernel:
    """The kernel for ``module``; Refused where there is none, MissingDependency."""
    try:
        from sparsify.codegen.triton import attend, blocks, ffn_kernel, linear
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "Triton is not installed, so routed modules on a GPU run eagerly",
            help="pip install 'sparsify-fx[triton]'",
        ) from error
    kind = type(module)  # a subclass may compute something else
    if kind is RoutedFFN and isinstance(module, RoutedFFN):
        return ffn_kernel.lower_ffn(module)
    if kind is RoutedLinear and isinstance(module, RoutedLinear):
        return linear.lower(module)
    if kind in (RoutedRows, RoutedColumns) and isinstance(module, RoutedRows | RoutedColumns):
        return blocks.lower(module)
    if kind is RoutedAttend and isinstance(module, RoutedAttend):
        return attend.lower(module)
    raise Refused(f"there is no Triton kernel for {kind.__name__}")
