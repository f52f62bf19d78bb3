"""Straight-line ATen programs: pieces of the user's model that routed modules run unchanged.

The activation of a feed-forward layer, and what happens to attention scores before the weighted
sum, are kept as the operations the model itself used; nothing is recognised by name and replaced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import BadCheckpoint
from sparsify.runtime.codec import Json, decode, encode, resolve


@dataclasses.dataclass(frozen=True)
class Ref:
    """A reference to an input or an earlier step."""

    name: str


@dataclasses.dataclass(frozen=True)
class Step:
    """``name = op(*args, **kwargs)``; ``op`` as in ``aten.mul.Tensor``, values may hold Refs."""

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Program:
    """``steps`` applied to ``inputs``; the value called ``output`` is the result.

    ``program(*tensors)`` runs it. With ``wide``, every floating dtype it names is float64 (a model
    captured in float32 and moved to float64: ``sparsify.runtime.graph.retarget``). Raises
    BadCheckpoint for an unknown operation, a name used before it is defined or defined twice.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    output: str
    wide: bool = False

    def __post_init__(self) -> None:
        known = set(self.inputs)
        broken = "" if len(known) == len(self.inputs) else "an input is named twice"
        for step in self.steps:
            resolve(step.op)
            missing = sorted(r for r in _refs((step.args, step.kwargs)) if r not in known)
            if missing:
                broken = f"step '{step.name}' uses '{missing[0]}' before it is defined"
            if step.name in known:
                broken = f"'{step.name}' is defined twice"
            known.add(step.name)
        if self.output not in known:
            broken = f"the output '{self.output}' is not defined"
        if broken:
            raise BadCheckpoint("a program is malformed", why=broken)

    @staticmethod
    def identity(name: str = "x") -> Program:
        """The program that returns its only input."""
        return Program((name,), (), name)

    def __call__(self, *tensors: Tensor) -> Tensor:
        if len(tensors) != len(self.inputs):
            raise TypeError(f"program of {self.inputs} called with {len(tensors)} values")
        plan = self._wide_plan if self.wide else self._plan
        values: list[Any] = list(tensors)
        for run in plan:
            values.append(run(values))
        result: Tensor = values[self._index[self.output]]
        return result

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {n: i for i, n in enumerate((*self.inputs, *(s.name for s in self.steps)))}

    @functools.cached_property
    def _plan(self) -> list[Callable[[list[Any]], Any]]:
        return [_bind(step, self._index) for step in self.steps]

    @functools.cached_property
    def _wide_plan(self) -> list[Callable[[list[Any]], Any]]:
        """In float64, an upcast to float32 that the model names would lose bits."""
        return [_bind(_widened(step), self._index) for step in self.steps]

    def __getstate__(self) -> dict[str, Any]:
        # The caches hold closures; copies and pickles build their own.
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_json(self) -> Json:
        """As JSON values."""
        return {
            "inputs": list(self.inputs),
            "steps": [
                [s.name, s.op, encode(tuple(s.args), _name), encode(dict(s.kwargs), _name)]
                for s in self.steps
            ],
            "output": self.output,
            "wide": self.wide,
        }

    @staticmethod
    def from_json(obj: Json) -> Program:
        """The inverse of :meth:`to_json`; BadCheckpoint where it is malformed."""
        try:
            steps = tuple(
                Step(name, op, decode(args, Ref), decode(kwargs, Ref))
                for name, op, args, kwargs in obj["steps"]
            )
            return Program(tuple(obj["inputs"]), steps, obj["output"], obj.get("wide", False))
        except (KeyError, TypeError, ValueError) as error:
            raise BadCheckpoint(
                "a program cannot be read", why=f"{type(error).__name__}: {error}"
            ) from error


def _bind(step: Step, index: Mapping[str, int]) -> Callable[[list[Any]], Any]:
    """``step`` as a function of the values so far.

    Activations run once per expert, so where every Ref is itself an argument (nearly always) only
    those positions are filled in.
    """
    op = resolve(step.op)
    args, kwargs = list(step.args), dict(step.kwargs)
    slots = [(i, index[a.name]) for i, a in enumerate(args) if isinstance(a, Ref)]
    others = [a for a in args if not isinstance(a, Ref)]
    if any(True for _ in _refs([others, kwargs])):
        return lambda values: op(*_fill(args, values, index), **_fill(kwargs, values, index))

    def run(values: list[Any]) -> Any:
        filled = args.copy()
        for place, source in slots:
            filled[place] = values[source]
        return op(*filled, **kwargs)

    return run


def _widened(step: Step) -> Step:
    """``step`` with float64 for every floating dtype that it names; itself where it names none."""

    def wide(value: Any) -> Any:
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.float64 if floating else value

    args = tuple(wide(a) for a in step.args)
    kwargs = {k: wide(v) for k, v in step.kwargs.items()}
    if args == step.args and kwargs == step.kwargs:
        return step
    return dataclasses.replace(step, args=args, kwargs=kwargs)


def _refs(value: Any) -> Iterator[str]:
    """Names of all Refs inside ``value``."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _refs(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _refs(item)
    elif isinstance(value, slice):
        yield from _refs([value.start, value.stop, value.step])


def _fill(value: Any, values: list[Any], index: Mapping[str, int]) -> Any:
    """``value`` with every Ref replaced."""
    if isinstance(value, Ref):
        return values[index[value.name]]
    if isinstance(value, list | tuple):
        return type(value)(_fill(v, values, index) for v in value)
    if isinstance(value, Mapping):
        return {k: _fill(v, values, index) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_fill(v, values, index) for v in (value.start, value.stop, value.step)))
    return value


def _name(value: Any) -> str | None:
    return value.name if isinstance(value, Ref) else None
