"""Graphs as modules and as JSON: one FX graph over a plain tree of parameters and routed modules.

A captured graph has flat tensor placeholders, a flat tuple output and plain code. ``assemble``
puts a graph on a module tree without copying a weight, ``graph_to_json``/``graph_from_json`` carry
it through checkpoints without pickle, and ``retarget`` moves the dtypes and devices that the graph
itself names (an ``arange(device=cpu)``, a cast to the model's dtype) when the model moves.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import BadCheckpoint
from sparsify.runtime.codec import decode, encode, op_name, resolve
from sparsify.runtime.program import Program


def assemble(graph: fx.Graph, root: nn.Module) -> fx.GraphModule:
    """``graph`` over the modules, parameters and buffers of ``root`` (shared, not copied)."""
    module = fx.GraphModule(nn.Module(), fx.Graph())
    module._modules = root._modules
    module._parameters = root._parameters
    module._buffers = root._buffers
    module._non_persistent_buffers_set = root._non_persistent_buffers_set
    module.graph = graph
    module.training = root.training
    return module


def attach(
    root: nn.Module, target: str, value: Tensor | nn.Module, persistent: bool = True
) -> None:
    """Put ``value`` at the dotted path ``target`` under ``root``, with plain modules on the way."""
    *path, name = target.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        child = owner._modules[part]
        assert child is not None
        owner = child
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value, persistent=persistent)


def clone(module: fx.GraphModule, memo: dict[int, Any] | None = None) -> fx.GraphModule:
    """A deep copy that keeps ties, buffer flags and node metadata."""
    memo = {} if memo is None else memo
    root = nn.Module()
    root._modules = copy.deepcopy(module._modules, memo)
    root._parameters = copy.deepcopy(module._parameters, memo)
    root._buffers = copy.deepcopy(module._buffers, memo)
    root._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    root.training = module.training
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, values)
    output = graph.output(result)
    output.meta = copy.copy(module.graph.output_node().meta)
    twin = assemble(graph, root)
    twin.meta = dict(module.meta)
    return twin


# ---------------------------------------------------------------------------- dtype and device


def retarget(
    module: fx.GraphModule,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Make the dtypes and devices that nodes name follow the model.

    A node that names the dtype the model was captured in (a mask in the model's dtype, a cast of
    positions) names ``dtype`` afterwards; in a float64 model every floating dtype becomes float64,
    so that upcasts to float32 do not lose bits. What the capture said is kept in ``node.meta``, so
    moving back restores it.
    """
    captured: torch.dtype | None = module.meta.get("dtype")
    changed = False
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        said = node.meta.setdefault("captured", _placements(node))
        if not said:
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        for key, value in said.items():
            new = _moved(value, captured, dtype, device)
            if isinstance(key, int):
                args[key] = new
            else:
                kwargs[key] = new
        if tuple(args) != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = tuple(args), kwargs
            changed = True
    wide = dtype == torch.float64 and captured != torch.float64
    for part in module.modules():
        for graph in getattr(part, "graphs", ()):  # of routed modules that hold one
            retarget(graph, dtype=dtype, device=device)
        for name, value in vars(part).items():
            if isinstance(value, Program) and dtype is not None and value.wide != wide:
                setattr(part, name, dataclasses.replace(value, wide=wide))
    if changed:
        module.recompile()


def _placements(node: fx.Node) -> dict[int | str, Any]:
    """The dtypes and devices among the node's arguments, by position or name."""
    named: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    return {key: value for key, value in named if isinstance(value, torch.dtype | torch.device)}


def _moved(
    said: Any,
    captured: torch.dtype | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Any:
    if isinstance(said, torch.device):
        return said if device is None else device
    if dtype is None or not said.is_floating_point:
        return said
    return dtype if said == captured or dtype == torch.float64 else said


def placement(module: nn.Module) -> tuple[torch.dtype | None, torch.device | None]:
    """The model's floating dtype (that of most parameter elements) and device."""
    sizes: dict[torch.dtype, int] = {}
    device = None
    for tensor in tensors(module):
        device = device or tensor.device
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return (max(sizes, key=lambda d: sizes[d]) if sizes else None), device


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers (each object once)."""
    yield from module.parameters()
    yield from module.buffers()


# ---------------------------------------------------------------------------- JSON


def graph_to_json(module: fx.GraphModule) -> dict[str, Any]:
    """The graph as plain data; weights and module contents are not in it.

    BadInput where the graph calls something that a checkpoint may not name.
    """
    nodes = [_node_to_json(node) for node in module.graph.nodes]
    dtype = module.meta.get("dtype")
    return {"dtype": encode(dtype), "nodes": nodes}


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    def ref(value: Any) -> str | None:
        return value.name if isinstance(value, fx.Node) else None

    target = op_name(node.target) if node.op == "call_function" else str(node.target)
    data: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
    if node.op in ("call_function", "call_module", "output"):
        data["args"] = [encode(arg, ref) for arg in node.args]
    if node.kwargs:
        data["kwargs"] = {key: encode(value, ref) for key, value in node.kwargs.items()}
    stack = node.meta.get("nn_module_stack")
    if stack:
        data["path"] = list(stack.values())[-1][0]
    for key in _SAVED_META:
        if key in node.meta:
            data[key] = node.meta[key]
    said = node.meta.get("captured")
    if said:  # what the capture named, for moving back (see retarget)
        data["captured"] = [[key, encode(value)] for key, value in said.items()]
    return data


def graph_from_json(data: Any, root: nn.Module) -> fx.GraphModule:
    """The graph that :func:`graph_to_json` wrote, over ``root``; BadCheckpoint where damaged."""
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    try:
        for entry in data["nodes"]:
            values[entry["name"]] = _node_from_json(entry, graph, values)
        dtype = decode(data["dtype"])
        graph.lint()
        module = assemble(graph, root)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadCheckpoint(
            "the saved graph is malformed", why=f"{type(error).__name__}: {error}"
        ) from error
    module.meta["dtype"] = dtype
    return module


def _node_from_json(entry: dict[str, Any], graph: fx.Graph, values: dict[str, fx.Node]) -> fx.Node:
    op, name = entry["op"], str(entry["name"])
    if op not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
        raise ValueError(f"a node cannot be of kind {op!r}")
    if not name.isidentifier():
        raise ValueError(f"a node cannot be called {name!r}")

    def lookup(key: str) -> fx.Node:
        return values[key]

    target: Any = resolve(entry["target"]) if op == "call_function" else str(entry["target"])
    if op in ("get_attr", "call_module"):
        _check_path(target)
    if op == "placeholder" and not target.isidentifier():
        raise ValueError(f"an input cannot be called {target!r}")
    args = tuple(decode(arg, lookup) for arg in entry.get("args", ()))
    kwargs = {str(key): decode(value, lookup) for key, value in entry.get("kwargs", {}).items()}
    if not all(key.isidentifier() for key in kwargs):
        raise ValueError(f"node {name} has an argument whose name is not one")
    node = graph.create_node(op, target, args, kwargs, name=name)
    if "path" in entry:
        path = str(entry["path"])
        node.meta["nn_module_stack"] = {path: (path, "")}
    for key in _SAVED_META:
        if key in entry:
            node.meta[key] = entry[key]
    if "captured" in entry:
        said = {key: decode(value) for key, value in entry["captured"]}
        if any(not isinstance(v, torch.dtype | torch.device) for v in said.values()):
            raise ValueError(f"node {name} names no dtype or device")
        node.meta["captured"] = said
    return node


def _check_path(path: str) -> None:
    """A dotted path of plain names: generated code reads it as attributes."""
    # Dunder names would reach into Python itself.
    if not all(_PART.fullmatch(p) and not p.startswith("__") for p in path.split(".")):
        raise ValueError(f"a weight or module cannot be called {path!r}")


# What sparsify.runtime.precision needs for moving a loaded model.
_SAVED_META = ("casts", "inserted_cast")
_PART = re.compile(r"[\w-]+")
