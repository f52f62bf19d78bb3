"""The plan: which routed modules of a model do work of their own, and which are alike."""

from __future__ import annotations

from torch import nn

from sparsify.runtime.budget import Budgeted
from sparsify.runtime.spec import RoutedModule

Group = list[tuple[str, RoutedModule]]


def grouped(model: nn.Module) -> list[Group]:
    """Routed modules that compute something, by kind: class, sizes, dtypes and device.

    Routers and selections are not listed: the modules that use them fuse them.
    """
    groups: dict[object, Group] = {}
    for path, module in model.named_modules():
        computes = isinstance(module, RoutedModule) and not isinstance(module, Budgeted)
        if computes and getattr(type(module), "counts", True):
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
