"""Lowering: every routed module of a model gets its kernel, or a remark says why it runs eagerly.

Kernels are chosen by the exact class of the module, for the device that its weights are on. They
run in inference only; in training, in verification, and where a kernel declines a call (too many
tokens, another dtype), the module's eager forward runs, which is what the kernel is held against.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from torch import nn

from sparsify.codegen.plan import grouped
from sparsify.core import Refused, Remark, RemarkKind
from sparsify.errors import MissingDependency
from sparsify.runtime.depth import RoutedLayer
from sparsify.runtime.model import SparseModel
from sparsify.runtime.spec import RoutedModule

LOWERINGS = {"cpu": "sparsify.codegen.cpu.lower", "cuda": "sparsify.codegen.triton.lower"}
DENSE = "sparsify.codegen.cpu.products"
Progress = Callable[[str, int, int], None]


def lower(
    model: nn.Module, *, int8: bool = False, progress: Progress | None = None
) -> tuple[Remark, ...]:
    """Put kernels into the routed modules of ``model``; one remark for each that does work, and one
    for the products of what is left dense.

    Args:
        model: a SparseModel, or any module that holds routed modules.
        int8: feed-forward layers and projections read int8 copies of their weights, one scale per
            row: a quarter of the bytes, another result. Off unless asked for.
        progress: called with (what, done, total).
    """
    remarks: list[Remark] = []
    device = _device(model)
    groups = grouped(model)
    for number, group in enumerate(groups):
        if progress is not None:
            progress("lower", number, len(groups))
        paths, modules = [path for path, _ in group], [module for _, module in group]
        remarks += _lower_alike(paths, modules, device, int8)
    if progress is not None:
        progress("lower", len(groups), len(groups))
    order = {path: at for at, (path, _) in enumerate(model.named_modules())}
    remarks.sort(key=lambda r: order[r.region])
    dense = [_lower_dense(model, device)] if isinstance(model, SparseModel) else []
    return (*remarks, *dense)


def lower_module(module: RoutedModule, *, int8: bool = False) -> Remark:
    """:func:`lower` for one module by itself."""
    return _lower_alike([""], [module], _device(module), int8)[0]


def _lower_dense(model: SparseModel, device: str) -> Remark:
    """What is left dense: on CPUs, products of a few tokens have a kernel too."""
    model.product, suggestion = None, None
    try:
        if device != "cpu":
            raise Refused(f"dense products on {device} are torch's")
        model.product, text = importlib.import_module(DENSE).products_of(model.graph)
    except Refused as error:
        text = error.reason
    except MissingDependency as error:
        text, suggestion = error.what, error.help
    kind: RemarkKind = "applied" if model.product else "left"
    return Remark(kind, "lower", "", "dense products", text, suggestion)


def _device(model: nn.Module) -> str:
    """Where the weights are; modules without weights follow their inputs, which are there too."""
    return next((p.device.type for p in model.parameters()), "cpu")


def _lower_alike(
    paths: Sequence[str], modules: Sequence[RoutedModule], device: str, int8: bool
) -> list[Remark]:
    """Modules of one kind: what holds for one holds for all."""
    for module in modules:
        module.kernel = None
    suggestion = None
    try:
        if isinstance(modules[0], RoutedLayer):
            raise Refused("its live tokens are gathered by torch; what is inside is lowered")
        if device not in LOWERINGS:
            raise Refused(f"there are no kernels for {device}")
        chosen = importlib.import_module(LOWERINGS[device])
        kernels, text = chosen.kernels_of(modules, int8=int8)
    except Refused as error:
        kernels, text, suggestion = [], error.reason, error.suggestion
    except MissingDependency as error:
        kernels, text, suggestion = [], error.what, error.help
    for module, kernel in zip(modules, kernels, strict=False):
        module.kernel = kernel
    return [
        Remark(
            "applied" if kernels else "left",
            module.pass_name,
            path,
            type(module).__name__,
            text,
            suggestion,
        )
        for path, module in zip(paths, modules, strict=True)
    ]
