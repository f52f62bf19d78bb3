"""Forms: every routed module as a computation whose shapes do not depend on what is selected.

An ONNX graph is one straight line of tensor operators. The eager forward of a routed module groups
tokens by unit in Python; its *form* is a subclass that overrides ``forward`` alone and gives the
same values by masks: every unit is computed, what is dead counts as nothing. Weights, dials and
tables stay where they are, so a form follows the module's present budget.

:func:`into_forms` changes the classes of the modules of a graph in place (of a clone: see
:func:`sparsify.codegen.onnx.trace.traced`). A routed module of another package can bring its own
with :func:`form`; without one its eager forward is traced.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from sparsify.core import Refused
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.counters import Counter
from sparsify.runtime.lora import Adapter
from sparsify.runtime.spec import RoutedModule

F = TypeVar("F", bound=type[RoutedModule])

_FORMS: dict[type[RoutedModule], type[RoutedModule]] = {}
_OURS = ("ffn", "projections", "attention", "blocks", "layers", "choices")


def form(of: type[RoutedModule]) -> Callable[[F], F]:
    """Class decorator: this subclass of ``of`` is how an ``of`` is exported.

    A form may have ``prepare()``, called once outside of tracing with real weights; it raises
    :class:`sparsify.core.Refused` where the module cannot be exported.
    """

    def register(cls: F) -> F:
        if not issubclass(cls, of):
            raise TypeError(f"{cls.__name__} is no subclass of {of.__name__}")
        _FORMS[of] = cls
        return cls

    return register


def form_of(kind: type[RoutedModule]) -> type[RoutedModule] | None:
    """The form of exactly that class; None where its own forward is traced."""
    for name in _OURS:
        importlib.import_module(f"sparsify.codegen.onnx.form_{name}")
    return _FORMS.get(kind)


class Silent(Counter):
    """A counter that counts nothing: sizes are symbols while a graph is traced."""

    def __init__(self) -> None:
        object.__setattr__(self, "numbers", array("q", [0] * 5))

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __getattr__(self, name: str) -> int:
        return 0

    def seen(self, tokens: int, units: int, live: int) -> None:
        pass


def into_forms(root: nn.Module, way: str = "mask", ways: Mapping[str, str] | None = None) -> None:
    """Give every routed module under ``root`` its form.

    Args:
        way: ``mask``, ``branch``, ``moe`` or ``custom``, for forms that can be written in several
            ways.
        ways: path -> way, for some.

    Raises:
        Unformed: with the path of the module, and why.
    """
    for path, module in routed_modules(root):
        try:
            _into_form(module, (ways or {}).get(path, way))
        except Refused as error:
            raise Unformed(path, module, error) from error


class Unformed(Exception):
    """A routed module that cannot be exported: where it is, what it is, why."""

    def __init__(self, path: str, module: nn.Module, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.path, self.kind, self.refused = path, type(module).__name__, refused


def routed_modules(root: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """(path, module) of all routed modules, inner ones too."""
    for path, module in root.named_modules():
        if isinstance(module, RoutedModule):
            yield path, module


def _into_form(module: RoutedModule, way: str) -> None:
    if any(isinstance(part, Adapter) for part in module.modules()):
        raise Refused(
            "an adapter changes its weights", suggestion="sparsify.runtime.lora.merge(model) first"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise Refused("a hook watches it", suggestion="remove the hook, then export")
    found = form_of(type(module))
    module.counter = Silent()
    module.kernel = None
    if isinstance(module, Budgeted):
        # thresholds are read off tables by Python: now, while the tables hold numbers
        _ = module.threshold if module.selector.mean else None
        if hasattr(module, "keep"):
            module.keep = False
    if found is not None:
        module.__class__ = found
        if hasattr(found, "way"):  # only some forms have it, and some of these not all ways
            able = getattr(found, "ways", (way,))
            setattr(module, "way", way if way in able else "mask")  # noqa: B010
        prepare = getattr(module, "prepare", None)
        if prepare is not None:
            prepare()


def dead_to_zero(values: Tensor, live: Tensor) -> Tensor:
    """``values`` where ``live`` (a mask that broadcasts), else 0; whatever a dead unit computed,
    infinities too."""
    return values.masked_fill(~live, 0.0)


def spread(select: Tensor, size: int) -> Tensor:
    """(..., N) -> (..., N * size): what is said of a unit, said of each of its features."""
    wide = select.unsqueeze(-1)
    return wide.expand(*wide.shape[:-1], size).flatten(-2)
