"""Graph values as JSON, and operations by name: no pickle, no eval.

``encode``/``decode`` turn the argument values of a graph (numbers, strings, lists, dtypes, devices,
references to other values) into JSON and back. ``op_name``/``resolve`` do the same for what a graph
calls; only the operations listed here resolve, so a checkpoint cannot name arbitrary code.
"""

from __future__ import annotations

import builtins
import math
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsify.errors import BadCheckpoint, BadInput, did_you_mean

Json = Any  # None | bool | int | float | str | list[Json] | dict[str, Json]

_NAMESPACES = {"aten", "prims", "sparsify", "quantized_decomposed", "torchao", "torchvision"}
# Operations of those namespaces that reach outside the graph.
_DENIED = {"aten.from_file", "aten.set_", "aten.resize_"}

_PLAIN: tuple[tuple[types.ModuleType, str], ...] = (
    (
        operator,
        """abs add and_ eq floordiv ge getitem gt index inv invert le lshift lt matmul mod mul ne
        neg not_ or_ pos pow rshift sub truediv truth xor""",
    ),
    (
        math,
        """acos asin atan atan2 ceil copysign cos cosh erf exp fabs floor fmod gcd isfinite isinf
        isnan lcm log log10 log1p log2 pow sin sinh sqrt tan tanh trunc""",
    ),
    (
        torch,
        """sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum _sym_acos _sym_asin
        _sym_atan _sym_cos _sym_cosh _sym_log2 _sym_sin _sym_sinh _sym_sqrt _sym_tan _sym_tanh""",
    ),
    (builtins, "abs bool float int len max min pow round sum"),
)
_BY_NAME: dict[str, Callable[..., Any]] = {
    f"{home.__name__}.{name}": getattr(home, name)
    for home, names in _PLAIN
    for name in names.split()
    if hasattr(home, name)
}
# Several names can mean one object (operator.abs is not builtins.abs, but torch has aliases).
_NAME_OF: dict[int, str] = {id(f): name for name, f in reversed(_BY_NAME.items())}


def allow_namespace(name: str) -> None:
    """Let graphs and checkpoints use the operators of ``torch.ops.<name>``."""
    _NAMESPACES.add(name)


def op_name(op: Any) -> str:
    """The name under which :func:`resolve` finds ``op``; BadInput where there is none."""
    if isinstance(op, torch._ops.OpOverload):
        name = str(op)
        if _allowed(name):
            return name
    elif id(op) in _NAME_OF:
        return _NAME_OF[id(op)]
    else:
        home = getattr(op, "__module__", None)
        label = getattr(op, "__qualname__", None) or getattr(op, "__name__", None) or repr(op)
        name = f"{home}.{label}" if home else str(label)
    raise BadInput(
        f"the operation '{name}' cannot be stored",
        why="sparse models hold ATen operators, arithmetic and torch.sym_* functions only",
        help=_namespace_help(name) or "capture the model with torch.export first",
    )


def resolve(name: str) -> Callable[..., Any]:
    """The operation called ``name``, e.g. ``aten.mul.Tensor``, ``operator.add``, ``math.ceil``.

    Raises BadCheckpoint for anything outside the list: names come from files.
    """
    if not isinstance(name, str):
        raise BadCheckpoint(f"an operation has the name {name!r}, which is not text")
    if name in _BY_NAME:
        return _BY_NAME[name]
    if _allowed(name):
        namespace, op, overload = name.split(".")
        try:
            found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
        except (AttributeError, RuntimeError):
            found = None
        if isinstance(found, torch._ops.OpOverload):
            return found
        raise BadCheckpoint(
            f"this torch has no operation '{name}'",
            why=f"torch {torch.__version__} is installed",
            help="load with the torch version that saved it"
            if namespace in ("aten", "prims")
            else f"import the package that defines torch.ops.{namespace} first",
        )
    raise BadCheckpoint(
        f"the operation '{name}' is not one that sparse models may use",
        why="only ATen operators, arithmetic and torch.sym_* functions are run from a file",
        help=_namespace_help(name) or did_you_mean(name, _BY_NAME),
    )


def _allowed(name: str) -> bool:
    parts = name.split(".")
    return (
        len(parts) == 3
        and parts[0] in _NAMESPACES
        and all(p.isidentifier() and not p.startswith("__") for p in parts)
        and f"{parts[0]}.{parts[1]}" not in _DENIED
    )


def _namespace_help(name: str) -> str | None:
    parts = name.split(".")
    if len(parts) == 3 and parts[0] not in _NAMESPACES and hasattr(torch.ops, parts[0]):
        return f"if you trust it: sparsify.runtime.codec.allow_namespace('{parts[0]}')"
    return None


_NAMED = {
    "$dtype": torch.dtype,
    "$layout": torch.layout,
    "$memory_format": torch.memory_format,
}


def encode(value: Any, ref: Callable[[Any], str | None] | None = None) -> Json:
    """``value`` as JSON.

    Args:
        ref: names a reference (an ``fx.Node``, a ``Ref``); returns None for plain values.
    """
    name = ref(value) if ref is not None else None
    if name is not None:
        return {"$ref": name}
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) is complex:
        return {"$complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, list | tuple):
        items = [encode(v, ref) for v in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise BadInput("a graph value is a dictionary whose keys are not all text")
        return {"$dict": {k: encode(v, ref) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"$slice": [encode(v, ref) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"$ellipsis": True}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    for tag, kind in _NAMED.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise BadInput(
        f"a graph value of type {type(value).__module__}.{type(value).__qualname__} "
        "cannot be stored",
        why=f"the value is {str(value)[:80]}",
        help="tensors belong in parameters or buffers; symbolic sizes in graph nodes",
    )


def decode(obj: Json, lookup: Callable[[str], Any] | None = None) -> Any:
    """The inverse of :func:`encode`; ``lookup`` yields what a reference name stands for."""
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    if isinstance(obj, list):
        return [decode(v, lookup) for v in obj]
    if isinstance(obj, dict) and len(obj) == 1:
        ((tag, body),) = obj.items()
        try:
            return _decode_tagged(tag, body, lookup)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _unreadable(obj) from error
    raise _unreadable(obj)


def _decode_tagged(tag: str, body: Json, lookup: Callable[[str], Any] | None) -> Any:
    if tag == "$ref" and lookup is not None:
        return lookup(body)
    if tag == "$tuple":
        return tuple(decode(v, lookup) for v in body)
    if tag == "$dict":
        return {k: decode(v, lookup) for k, v in body.items()}
    if tag == "$slice":
        start, stop, step = (decode(v, lookup) for v in body)
        return slice(start, stop, step)
    if tag == "$float":
        return float(body)
    if tag == "$complex":
        real, imag = (decode(v) for v in body)
        return complex(real, imag)
    if tag == "$ellipsis":
        return Ellipsis
    if tag == "$device":
        return torch.device(body)
    if tag in _NAMED:
        found = getattr(torch, body)
        if isinstance(found, _NAMED[tag]):
            return found
    raise ValueError(tag)


def _unreadable(obj: Json) -> BadCheckpoint:
    return BadCheckpoint(
        f"a graph value cannot be read: {str(obj)[:80]}",
        help="the file is damaged or comes from a newer sparsify",
    )
