"""The plan: which routed modules of a model do work of their own, and which are alike."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sparsify.runtime.budget import Budgeted
from sparsify.runtime.spec import RoutedModule

Group = list[tuple[str, RoutedModule]]


def working(model: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """Routed modules that compute something, with their paths.

    Routers and selections are left out: the modules that use them fuse them.
    """
    for path, module in model.named_modules():
        computes = isinstance(module, RoutedModule) and not isinstance(module, Budgeted)
        if computes and getattr(type(module), "counts", True):
            yield path, module


def grouped(model: nn.Module) -> list[Group]:
    """:func:`working` modules by kind: class, sizes, dtypes and device."""
    groups: dict[object, Group] = {}
    for path, module in working(model):
        groups.setdefault(_kind(module), []).append((path, module))
    return list(groups.values())


def _kind(module: RoutedModule) -> object:
    shapes = [
        (name, tuple(p.shape), p.dtype, p.device.type)
        for name, p in module.named_parameters(recurse=False)
    ]
    inside = module._modules.get("inside")
    rule = str(inside.selector) if isinstance(inside, Budgeted) else ""
    programs = [repr(v) for v in vars(module).values() if type(v).__name__ == "Program"]
    parts = [type(m) for m in module.modules()]
    return (type(module), rule, str(shapes), str(programs), str(parts))
