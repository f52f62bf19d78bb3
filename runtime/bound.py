"""Calls of routed modules that were looked at once: a printed graph's guard.

Before a kernel reads a token's weights, somebody has to know that all that was prepared still
holds: no hook, no other module or weight in its place, no turn of the dial. Asked call by call, of
objects that went cold while weights streamed through the caches, that took longer than half of the
small kernels did. :class:`Bound` asks once per step, for all modules of a graph, in loops that run
in C; in between only the count of changes is compared (:mod:`sparsify.runtime.changes`).

What can change *within* a step does so through code that runs in it: hooks. Where one of the
modules has any, nothing is bound, and every call looks for itself.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from sparsify.runtime.beside import together
from sparsify.runtime.changes import Changes, Noticed
from sparsify.runtime.spec import Binding

Calls = tuple[Callable[..., Any], ...]


class Bound:
    """What to call in place of modules.

    Args:
        root: the modules' root.
        wanted: paths of each call: one module, which is called as it is, or several (``joint``),
            which take one x and give a sequence.
    """

    def __init__(self, root: nn.Module, wanted: Sequence[tuple[str, ...]]) -> None:
        self.root = root
        self.wanted = tuple(wanted)
        self._now: _Held | None = None

    def __call__(self) -> Calls:
        """One callable for each of ``wanted``, good until the graph's next step."""
        now = self._now
        if now is None or not now.holds():
            now = self._now = self._read()
        return now.calls

    def _read(self) -> _Held:
        count = Changes.count  # not what it is afterwards: others may change something meanwhile
        slots: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        groups = [[self._find(path, slots) for path in paths] for paths in self.wanted]
        modules = [module for group in groups for module in group]
        if any(map(unusual, modules)) or not all(isinstance(m, Noticed) for m in modules):
            return _Held(-1, tuple(_careful(group) for group in groups))
        calls, copied = [], list[Tensor]()
        for group in groups:
            own = any("forward" in module.__dict__ for module in group)
            bind = None if own else getattr(group[0].kernel, "bind", None)
            found: Binding | None = None if bind is None else bind(group)
            if found is not None:
                copied += found.copied
                calls.append(found.call)
            else:
                calls.append(group[0].forward if len(group) == 1 else _careful(group))
        for module in modules:
            slots |= _parameters(module)
        return _Held.of(count, tuple(calls), list(slots.values()), copied)

    def _find(self, path: str, slots: dict[Any, Any]) -> Any:
        at: Any = self.root
        for name in path.split("."):
            owner, at = at._modules, at._modules[name]
            slots[id(owner), name] = (owner, name, at)
        return at


@dataclasses.dataclass(slots=True)
class _Held:
    """Calls, and what they are good for.

    Attributes:
        count: of changes; -1 = for one step only.
        owners, names, values: dictionaries, and what they held.
        tensors, places: where tensors lay; copied, versions: those of which copies were made.
    """

    count: int
    calls: Calls
    owners: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()
    copied: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()

    @staticmethod
    def of(
        count: int, calls: Calls, slots: Sequence[tuple[dict[str, Any], str, Any]],
        copied: Sequence[Tensor],
    ) -> _Held:  # fmt: skip
        owners, names, values = zip(*slots, strict=True) if slots else ((), (), ())
        tensors = tuple(value for value in values if isinstance(value, Tensor))
        copied = tuple(tensor for tensor in copied if not tensor.is_inference())
        return _Held(
            count, calls, owners, names, values, tensors, tuple(map(Tensor.data_ptr, tensors)),
            copied, tuple(map(_version, copied)),
        )  # fmt: skip

    def holds(self) -> bool:
        return (
            Changes.count == self.count
            and not (_hooks._global_forward_hooks or _hooks._global_forward_pre_hooks)
            and all(map(operator.is_, map(dict.get, self.owners, self.names), self.values))
            and tuple(map(Tensor.data_ptr, self.tensors)) == self.places
            and tuple(map(_version, self.copied)) == self.versions
        )


_version = operator.attrgetter("_version")


def _parameters(module: nn.Module) -> Iterator[Any]:
    """(key, (dictionary, name, parameter)); buffers count their changes."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield (id(part), name), (part._parameters, name, parameter)


def _careful(group: Sequence[Any]) -> Callable[..., Any]:
    """As if nobody knew anything."""
    if len(group) == 1:
        return group[0]  # type: ignore[no-any-return]
    if any(unusual(module) or "forward" in module.__dict__ for module in group):
        return lambda x: [module(x) for module in group]
    return lambda x: together(group, x)


def unusual(module: Any) -> bool:
    """Whether a call of it does more than to run ``forward``: hooks."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"]
        or _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks
    )  # fmt: skip
