"""Which Triton kernel runs a routed module, chosen by the module's exact class."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsify.core import Refused
from sparsify.errors import MissingDependency
from sparsify.runtime.spec import Kernel, RoutedModule

if TYPE_CHECKING:
    from sparsify.codegen.triton.spec import KernelSpec

# class -> where it is lowered, and how the names of its kernels begin
_LOWER = {
    "RoutedFFN": (
        "ffn_kernel.lower_ffn",
        ("count_pairs", "place_pairs", "sort_", "ffn_hidden", "ffn_scatter", "decode_"),
    ),
    "RoutedLinear": ("linear.lower", ("linear_", "split_sum")),
    "RoutedRows": ("rows.lower", ("group_tokens", "rows_")),
    "RoutedColumns": ("columns.lower", ("columns_", "split_sum")),
    "RoutedAttend": ("attend.lower", ("group_tokens", "attend_")),
}


def kernels_of(modules: Sequence[RoutedModule], *, int8: bool = False) -> tuple[list[Kernel], str]:
    """A kernel for each of ``modules``, which are alike, and what was built.

    Raises:
        Refused: there is none for that kind. MissingDependency: Triton is not installed.
    """
    if int8:
        raise Refused("int8 copies of weights are read by CPU kernels only")
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "Triton is not installed, so routed modules on a GPU run eagerly",
            help="pip install 'sparsify-fx[triton]'",
        ) from error
    return [kernel_of(module) for module in modules], "Triton kernels, compiled at the first call"


def kernel_of(module: RoutedModule) -> Any:
    """The module's kernel; Refused with the reason where it has none.

    Nothing is said about the device: :func:`sparsify.codegen.triton.host.check_tensor` does that.
    """
    name = type(module).__name__
    if name not in _LOWER:
        raise Refused(f"no Triton kernel for a {name}: it runs eagerly")
    file, _, function = _LOWER[name][0].rpartition(".")
    found = importlib.import_module(f"sparsify.codegen.triton.{file}")
    return getattr(found, function)(module)


def specs_of(module: RoutedModule) -> tuple[KernelSpec, ...]:
    """The kernels that :func:`kernel_of` launches; none for a module of another class."""
    from sparsify.codegen.triton.spec import registered

    starts = _LOWER.get(type(module).__name__, ("", ()))[1]
    return tuple(s for s in registered() if starts and s.name.startswith(starts))
