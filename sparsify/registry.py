"""Which passes there are: ``passes/ffn_moe.py`` is ``ffn-moe``; others come in by entry point.

A file of ``passes/`` whose name does not start with ``_`` holds exactly one pass. Another
distribution adds one through the entry point group ``sparsify.passes``::

    [project.entry-points."sparsify.passes"]
    my-pass = "my_package.my_pass"            # or "my_package.my_pass:MyPass"

Each is imported when it is first asked for, so a broken one breaks nothing but itself. Two owners
of one name are an error that names both: what a pipeline means never depends on install order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from sparsify.core import Pass, Refused
from sparsify.errors import BadOption, PassClash, UnknownPass, did_you_mean
from sparsify.text import StageText

GROUP = "sparsify.passes"
OURS = "sparsify-fx"
_FOLDER = Path(__file__).parent / "passes"
_OPTION_TYPES = (int, float, str, bool)
_RESERVED = ("at", "skip")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered pass that may not be imported yet.

    Attributes:
        name: the pass name.
        owner: the distribution that registers it.
        module: the module to import; attribute: the class in it, or None for its only pass.
    """

    name: str
    owner: str
    module: str
    attribute: str | None = None

    @property
    def target(self) -> str:
        """``module`` or ``module:attribute``, as in an entry point."""
        return f"{self.module}:{self.attribute}" if self.attribute else self.module


# ---------------------------------------------------------------------------- finding


def entries() -> dict[str, tuple[Entry, ...]]:
    """All registrations by name, sorted; more than one for a name is a clash."""
    found: dict[str, list[Entry]] = {}
    for file in sorted(_FOLDER.glob("[!_]*.py")):
        entry = Entry(file.stem.replace("_", "-"), OURS, f"sparsify.passes.{file.stem}")
        found.setdefault(entry.name, []).append(entry)
    for entry in _outside(tuple((place, _changed(place)) for place in sys.path)):
        found.setdefault(entry.name, []).append(entry)
    return {
        name: tuple(sorted(found[name], key=lambda e: (e.owner != OURS, e.owner)))
        for name in sorted(found)
    }


@functools.lru_cache(maxsize=1)
def _outside(_places: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """The entry points of all distributions: 15 ms, for the metadata of each is read.

    Args:
        _places: ``sys.path`` and when each folder last changed; installing changes one of them.
    """
    import importlib.metadata  # it brings email and more: 15 ms that --help need not pay

    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        owner = point.dist.name if point.dist else "an unknown distribution"
        module, _, attribute = point.value.partition(":")
        found.append(Entry(point.name, owner, module.strip(), attribute.strip() or None))
    return tuple(found)


def _changed(place: str) -> int:
    """When a folder of ``sys.path`` last changed, in ns; 0 where there is none."""
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0


def names() -> tuple[str, ...]:
    """The names of all registered passes, sorted. Imports none of them."""
    return tuple(entries())


def owner(name: str) -> str:
    """The distribution that registers the pass ``name``."""
    return _entry(name).owner


def _entry(
    name: str, where: str | None = None, known: Mapping[str, tuple[Entry, ...]] | None = None
) -> Entry:
    known = entries() if known is None else known
    if name not in known:
        hint = did_you_mean(name, known) or (f"passes: {', '.join(known)}" if known else None)
        raise UnknownPass(f"no pass named '{name}'", where=where, help=hint)
    first, *others = known[name]
    if others:
        owners = " and ".join(f"{e.owner} ({e.target})" for e in (first, *others))
        loser = next((e.owner for e in others if e.owner != OURS), first.owner)
        raise PassClash(
            f"two packages register a pass named '{name}'",
            why=f"{owners}",
            help=f"rename one of them, or: pip uninstall {loser}",
        )
    return first


# ---------------------------------------------------------------------------- loading


def get(name: str) -> type[Pass[Any]]:
    """The pass class called ``name``.

    Raises:
        UnknownPass: no such name; with the closest one.
        PassClash: two owners, or the registered thing is not a well-formed pass.
    """
    return _load(_entry(name))


def all_passes() -> dict[str, type[Pass[Any]]]:
    """Every pass that works, by name; :func:`problems` says what is wrong with the others."""
    return survey()[0]


def problems() -> tuple[PassClash, ...]:
    """One error for each registered name that cannot be used."""
    return survey()[1]


def build(stage: StageText, path: str | None = None) -> Pass[Any]:
    """The pass that ``stage`` describes; errors point at the culprit in the pipeline text.

    Args:
        path: of a region: with the options that are local to it; None = without any (those are
            checked all the same).
    """
    cls = _load(_entry(stage.name, stage.caret()))
    try:
        for key, _, value in stage.local if path is None else ():
            cls.build({**stage.options, key: value})
        return cls.build(stage.options if path is None else stage.options_at(path))
    except BadOption as error:
        key = _culprit(cls, stage)
        raise BadOption(
            error.what, where=stage.caret(key), why=error.why, help=error.help
        ) from None
    except (Refused, ValueError) as error:  # from a pass's __post_init__: options that do not mix
        raise BadOption(
            f"{stage.name} cannot take these options",
            where=stage.caret(),
            why=str(error),
            help=getattr(error, "suggestion", None),
        ) from None


def survey() -> tuple[dict[str, type[Pass[Any]]], tuple[PassClash, ...]]:
    """:func:`all_passes` and :func:`problems` in one look."""
    good: dict[str, type[Pass[Any]]] = {}
    bad: list[PassClash] = []
    known = entries()  # once: it reads the metadata of every installed distribution
    for name in known:
        try:
            good[name] = _load(_entry(name, known=known))
        except PassClash as error:
            bad.append(error)
    return good, tuple(bad)


def _culprit(cls: type[Pass[Any]], stage: StageText) -> str:
    """The span key of the first option that is wrong by itself."""
    fields = {f.name for f in dataclasses.fields(cls)}
    local = [(f"{key}@{pattern}", key, value) for key, pattern, value in stage.local]
    for full, key, value in [*((k, k, v) for k, v in stage.options.items()), *local]:
        try:
            cls.build({key: value})
        except BadOption:
            return f"{full}=" if key in fields else full
    return ""


def _load(entry: Entry) -> type[Pass[Any]]:
    try:
        module = importlib.import_module(entry.module)
        found = getattr(module, entry.attribute) if entry.attribute else _only_pass(module)
    except (Exception, SystemExit) as error:  # whatever a foreign module does while it is imported
        raise _malformed(entry, f"{type(error).__name__}: {error}") from error
    fault = _fault(found, entry)
    if fault is not None:
        raise _malformed(entry, fault)
    return typing.cast("type[Pass[Any]]", found)


def _malformed(entry: Entry, why: str) -> PassClash:
    return PassClash(
        f"the pass '{entry.name}' of {entry.owner} cannot be used",
        where=f"--> {entry.target}",
        why=why,
        help=None if entry.owner == OURS else f"mend or remove it: pip uninstall {entry.owner}",
    )


def _only_pass(module: Any) -> Any:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        held = ", ".join(c.__name__ for c in found) or "none"
        raise TypeError(f"a pass file holds one subclass of sparsify.Pass; this one holds {held}")
    return found[0]


def _fault(found: Any, entry: Entry) -> str | None:
    """What keeps ``found`` from being a pass, or None."""
    if not (isinstance(found, type) and issubclass(found, Pass)):
        return f"{found!r} is not a subclass of sparsify.Pass"
    if "__dataclass_fields__" not in vars(found):
        return f"{found.__name__} is not decorated with @dataclasses.dataclass(frozen=True)"
    if found.name != entry.name:
        return f"{found.__name__} calls itself '{found.name}' but is registered as '{entry.name}'"
    own = vars(found).get("__doc__") or ""
    written = own and not own.startswith(f"{found.__name__}(")  # what dataclass makes up
    if not (inspect.getdoc(sys.modules[found.__module__]) or written):
        return "neither the module nor the class has a docstring"
    if not isinstance(getattr(found, "region_type", None), type):
        return f"{found.__name__} does not name its region type, as in Pass[FeedForward]"
    if found.rewrite is Pass.rewrite:
        return f"{found.__name__} has no rewrite method"
    return _option_fault(typing.cast("Hashable", found))  # mypy reads the hash of its instances


@functools.cache
def _option_fault(cls: type[Pass[Any]]) -> str | None:
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in _RESERVED:
            return f"the option name '{field.name}' belongs to the pipeline"
        if types[field.name] not in _OPTION_TYPES:
            return f"option '{field.name}' is no int, float, str or bool: {types[field.name]}"
        if field.default is dataclasses.MISSING:
            return f"option '{field.name}' has no default"
        try:
            cls.build({field.name: field.default})
        except BadOption as error:
            return f"the default of option '{field.name}' is not legal: {error.what}"
    return None
