"""Structures of tensors as JSON: how a call's arguments and results are laid out flat.

A tree says where each tensor of a flat list goes: tuples, lists, dicts, named tuples, records
(dataclass outputs such as transformers' ``ModelOutput``) and plain values. Trees are JSON-able, so
checkpoints can hold them; rebuilding never runs code that a file names, except the output classes
of transformers and diffusers.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Any]

_TRUSTED_ROOTS = ("transformers", "diffusers")
_seen_classes: dict[str, type] = {}


class Record(dict[str, Any]):
    """A dict whose items are attributes too: stands in for an output class not installed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(value for value in self.values() if value is not None)


class UnknownStructure(TypeError):
    """A value that no tree can describe; the message names its type and place."""


def describe(value: Any, leaves: list[Tensor], path: str = "") -> Tree:
    """The tree of ``value``; its tensors are appended to ``leaves`` in order."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return {"kind": "tensor"}
    if value is None or isinstance(value, bool | int | float | str):
        return {"kind": "value", "value": value}
    if isinstance(value, torch.dtype):
        return {"kind": "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = zip(value._fields, value, strict=True)
        items = {n: describe(v, leaves, f"{path}.{n}") for n, v in pairs}
        return {"kind": "record", "class": remember(type(value)), "items": items}
    if isinstance(value, tuple | list):
        kind = "list" if isinstance(value, list) else "tuple"
        each = [describe(v, leaves, f"{path}.{i}") for i, v in enumerate(value)]
        return {"kind": kind, "items": each}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        present = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        items = {n: describe(v, leaves, f"{path}.{n}") for n, v in present.items() if v is not None}
        return {"kind": "record", "class": remember(type(value)), "items": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: describe(v, leaves, f"{path}.{key}") for key, v in value.items()}
        return {"kind": "dict", "items": items}
    where = f" at '{path.lstrip('.')}'" if path else ""
    raise UnknownStructure(f"a value of type {type(value).__qualname__}{where}")


def rebuild(tree: Tree, leaves: Sequence[Tensor]) -> Any:
    """The inverse of :func:`describe`."""
    return _rebuild(tree, iter(leaves))


def _rebuild(tree: Tree, leaves: Any) -> Any:
    kind = tree["kind"]
    if kind == "tensor":
        return next(leaves)
    if kind == "value":
        return tree["value"]
    if kind == "dtype":
        return getattr(torch, tree["value"])
    if kind == "list":
        return [_rebuild(item, leaves) for item in tree["items"]]
    if kind == "tuple":
        return tuple(_rebuild(item, leaves) for item in tree["items"])
    items = {key: _rebuild(item, leaves) for key, item in tree["items"].items()}
    if kind == "dict":
        return items
    return (find_class(tree["class"]) or Record)(**items)


def count(tree: Tree) -> int:
    """How many tensors the tree holds."""
    if tree["kind"] == "tensor":
        return 1
    items = tree.get("items", ())
    return sum(count(item) for item in (items.values() if isinstance(items, dict) else items))


def leaf_names(tree: Tree, prefix: str) -> list[str]:
    """A readable name for every tensor of the tree, e.g. ``past_key_values_0_key``."""
    if tree["kind"] == "tensor":
        return [prefix]
    items = tree.get("items", ())
    pairs = items.items() if isinstance(items, dict) else enumerate(items)
    return [name for key, item in pairs for name in leaf_names(item, f"{prefix}_{key}")]


def record(path: str, **items: Any) -> Any:
    """A result of the output class called ``path`` (``module:Class``), or a Record."""
    return (find_class(path) or Record)(**items)


def remember(cls: type) -> str:
    """The path under which :func:`record` finds ``cls`` again."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    _seen_classes[path] = cls
    return path


def find_class(path: str) -> type | None:
    """The output class of that name; None (then a Record stands in) unless seen here or trusted."""
    if path in _seen_classes:
        return _seen_classes[path]
    module_name, _, qualname = path.partition(":")
    if module_name.partition(".")[0] not in _TRUSTED_ROOTS:
        return None
    try:
        module = sys.modules.get(module_name) or importlib.import_module(module_name)
    except ImportError:
        return None
    found = getattr(module, qualname, None)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None
