"""Which CPU kernel a routed module gets.

Depth routing (:class:`sparsify.runtime.depth.RoutedLayer`) has none: it gathers and scatters live
tokens around a whole layer. Measured (one thread, half of the tokens live, width 576): finding,
gathering and scattering them takes torch 11 us for 1 token, 32 us for 64, 246 us for 512, where one
576 x 2304 matmul on those tokens alone takes 150, 2300 and 11200 us, and a layer has several.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.codegen.cpu.attend import AttendKernel
from sparsify.codegen.cpu.choice import Tuned, tune
from sparsify.codegen.cpu.ffn import FfnKernel
from sparsify.codegen.cpu.heads import ColumnsKernel, HeadsKernel, RowsKernel
from sparsify.codegen.cpu.linear import LinearKernel
from sparsify.codegen.cpu.tune import chooser, table_of, told
from sparsify.codegen.elementwise import CannotLower
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.hidden import HiddenColumns
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.spec import Kernel, RoutedModule


def kernels_of(modules: Sequence[RoutedModule], *, int8: bool = False) -> tuple[list[Kernel], str]:
    """A kernel for each of ``modules``, which are alike, and what was built.

    Raises:
        Refused: there is none for that kind. NoCompiler, BuildFailed: of the C compiler.
    """
    if type(modules[0]) is RoutedFFN:
        layers = [m for m in modules if isinstance(m, RoutedFFN)]
        inside = layers[0].inside
        if inside is not None and not inside.selector.mean:
            raise Refused(f"neurons of experts are selected by threshold, not {inside.rule}")
        try:
            kernels = [FfnKernel(layer, int8=int8) for layer in layers]
        except CannotLower as error:
            raise Refused(f"the activation cannot be written in C: {error}") from error
        table = table_of(layers, kernels)
        choose = chooser(table)
        for kernel in kernels:
            kernel.choose = choose
        return [*kernels], told(table)
    made = [kernel_of(module, int8=int8) for module in modules]
    text = "C kernel for up to 8 tokens, then eager"
    tuned: list[Tuned] = [k for k in made if isinstance(k, LinearKernel | HeadsKernel)]
    found = tune(modules, tuned) if tuned else ""
    return [*made], f"{text}; {found}" if found else text


def kernel_of(module: RoutedModule, *, int8: bool = False) -> Kernel:
    """The kernel for ``module``; Refused where there is none, NoCompiler, BuildFailed."""
    kind = type(module)  # a subclass may compute something else
    if kind is RoutedLinear and isinstance(module, RoutedLinear):
        return LinearKernel(module, int8=int8)
    if kind is RoutedRows and isinstance(module, RoutedRows):
        return RowsKernel(module)
    # what mixes the outputs of HiddenColumns does so after the kernel
    if kind in (RoutedColumns, HiddenColumns) and isinstance(module, RoutedColumns):
        return ColumnsKernel(module)
    if kind is RoutedAttend and isinstance(module, RoutedAttend):
        return AttendKernel(module)
    raise Refused(f"there is no CPU kernel for {kind.__name__}")
