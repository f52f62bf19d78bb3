"""Capture of any module by example: arguments and results keep the structure the caller knows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.capture.export import (
    Exported,
    compare,
    evaluating,
    export,
    run_flat,
    slots_of,
)
from sparsify.capture.failures import failed
from sparsify.capture.normalise import normalise
from sparsify.errors import CaptureFailed
from sparsify.runtime.calling import ModuleCall, Slot
from sparsify.runtime.trees import Tree, UnknownStructure, count, describe, leaf_names, rebuild

Captured = tuple[Exported, ModuleCall, tuple[Tensor, ...], tuple[Tensor, ...]]


def capture_module(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: bool
) -> Captured:
    """Export ``model(*args, **kwargs)``; returns graph, call, flat example, golden outputs."""
    args, kwargs = _on_device(model, (args, kwargs))
    notes: list[str] = []
    with evaluating(model):
        outputs = _run(model, args, kwargs)
        if dynamic:
            args, kwargs, outputs = _widen(model, args, kwargs, outputs, notes)
        call, example = _describe_call(model, args, kwargs, outputs)

        def run(inner: nn.Module, flat: Sequence[Tensor]) -> Sequence[Tensor]:
            again = _unbind(call.captured, call.parameters, flat)
            leaves: list[Tensor] = []
            describe(inner(*again[0], **again[1]), leaves)
            return leaves

        names = [slot.name for slot in call.slots]
        axes = [list(range(min(2, t.ndim))) if dynamic else [] for t in example]
        exported = export(model, run, example, names, axes)
        golden: list[Tensor] = []
        describe(outputs, golden)
        ours = run_flat(exported.graph, example)
        compare(model, ours, golden, "the example")
    call = ModuleCall(exported.slots, call.parameters, call.captured, call.output, call.model)
    exported = Exported(exported.graph, exported.slots, (*notes, *exported.notes))
    return exported, call, tuple(example), tuple(t.detach() for t in golden)


def capture_program(program: torch.export.ExportedProgram) -> Captured:
    """Take a ready ExportedProgram as it is."""
    if program.example_inputs is None:
        raise CaptureFailed(
            "the exported program holds no example inputs",
            help="export it again with torch.export.export, which keeps them",
        )
    args, kwargs = program.example_inputs
    names = [
        p.name
        for p in inspect.signature(program.module(check_guards=False).forward).parameters.values()
    ]
    trees: dict[str, Tree] = {}
    example: list[Tensor] = []
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        trees[name] = _tree(value, example, name)
    flat_names = _unique([n for name, tree in trees.items() for n in leaf_names(tree, name)])
    dense = program.module(check_guards=False)
    assert isinstance(dense, fx.GraphModule)
    with torch.no_grad():
        outputs = dense(*args, **kwargs)
    golden: list[Tensor] = []
    output = _tree(outputs, golden, "the result")
    slots = slots_of(program, flat_names)
    graph = normalise(dense, flat_names, "", None)
    compare(dense, run_flat(graph, example), golden, "the example")
    call = ModuleCall(slots, tuple(trees), trees, output, "the exported program")
    return Exported(graph, slots, ()), call, tuple(example), tuple(t.detach() for t in golden)


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # user code raises anything
        raise failed(
            f"{type(model).__name__} does not run on the example",
            error,
            help="pass example=... with inputs that the model itself accepts",
        ) from error


def _tree(value: Any, leaves: list[Tensor], name: str) -> Tree:
    try:
        return describe(value, leaves)
    except UnknownStructure as error:
        raise CaptureFailed(
            f"'{name}' holds {error}, which cannot go through a graph",
            help="use tensors, tuples, lists, dicts, dataclasses, numbers or None",
        ) from error


def _describe_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any
) -> tuple[ModuleCall, list[Tensor]]:
    parameters = inspect.signature(model.forward).parameters
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    names = tuple(stars.get(p.kind, "") + name for name, p in parameters.items())
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    values: dict[str, Any] = {}
    for name, value in bound.items():
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    example: list[Tensor] = []
    trees = {name: _tree(value, example, name) for name, value in values.items()}
    trees = {name: tree for name, tree in trees.items() if tree.get("value", 0) is not None}
    golden: list[Tensor] = []
    output = _tree(outputs, golden, "the result")
    if not golden:
        raise CaptureFailed(f"{type(model).__name__} returns no tensor")
    flat_names = _unique([n for name, tree in trees.items() for n in leaf_names(tree, name)])
    slots = tuple(
        Slot(name, tuple(t.shape), (), t.is_floating_point())
        for name, t in zip(flat_names, example, strict=True)
    )
    return ModuleCall(slots, names, trees, output, type(model).__name__), example


def _unbind(
    trees: Mapping[str, Tree], parameters: Sequence[str], flat: Sequence[Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments from flat tensors: positional up to a variadic one, else by keyword."""
    values: dict[str, Any] = {}
    at = 0
    for name, tree in trees.items():
        size = count(tree)
        values[name] = rebuild(tree, flat[at : at + size])
        at += size
    variadic = next((n[1:] for n in parameters if n[0] == "*" and n[1:2] != "*"), None)
    if variadic is None or variadic not in values:
        return [], values
    before = parameters[: parameters.index(f"*{variadic}")]
    args = [values.pop(name) for name in before]
    return [*args, *values.pop(variadic)], values


def _unique(names: Sequence[str]) -> list[str]:
    """Names that can be placeholders: identifiers, each once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
        clean = clean if clean.isidentifier() else f"x_{clean}"
        seen[clean] = seen.get(clean, 0) + 1
        result.append(clean if seen[clean] == 1 else f"{clean}_{seen[clean]}")
    return result


# ---------------------------------------------------------------------------- sizes of one


def _widen(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Any,
    notes: list[str],
) -> tuple[Sequence[Any], Mapping[str, Any], Any]:
    """Repeat a batch (and a token sequence) of one: export would fix a size of 1 for good."""
    leaves: list[Tensor] = []
    describe((list(args), dict(kwargs)), leaves)
    for axis, word in ((0, "batch"), (1, "sequence")):
        mine = [t for t in leaves if t.ndim > axis and (axis == 0 or not t.is_floating_point())]
        if not mine or any(t.shape[axis] != 1 for t in mine):
            continue

        def double(value: Any, axis: int = axis) -> Any:
            fits = isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == 1
            if fits and (axis == 0 or not value.is_floating_point()):
                return torch.cat([value, value], dim=axis)
            return value

        wide_args, wide_kwargs = _map((list(args), dict(kwargs)), double)
        try:
            with torch.no_grad():
                wide = model(*wide_args, **wide_kwargs)
        except Exception as error:  # the model may insist on one
            notes.append(
                f"the {word} of the example is 1 and stays fixed: the model fails on 2 "
                f"({type(error).__name__})"
            )
            continue
        args, kwargs, outputs = wide_args, wide_kwargs, wide
    return args, kwargs, outputs


def _on_device(model: nn.Module, value: Any) -> Any:
    first = next(model.parameters(), None)
    if first is None:
        return value
    device = first.device
    return _map(value, lambda v: v.to(device) if isinstance(v, Tensor) else v)


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, change) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, Mapping):
        return {key: _map(v, change) for key, v in value.items()}
    return change(value)
