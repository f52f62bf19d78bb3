"""Graphs as modules and as JSON: one FX graph over a plain tree of parameters and routed modules.

A captured graph has flat tensor placeholders, a flat tuple output and plain code. ``assemble`` puts a
graph on a module tree without copying a weight, ``graph_to_json``/``graph_from_json`` carry it through
checkpoints without pickle, and ``retarget`` moves the dtypes and devices that the graph itself names
(an ``arange(device=cpu)``, a cast to the model's dtype) when the model moves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


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
    """Put ``value`` at the dotted path ``target`` under ``root``, making plain modules on the way."""
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
    positions) names ``dtype`` afterwards; in a float64 model every floating dtype becomes float64, so
    that upcasts to float32 do not lose bits. What the capture said is kept in ``node.meta``, so moving
    back restores it.
    """
    captured: torch.dtype | None = module.meta.get("dtype")
    changed = False
    for node in module.graph.nodes:
        if not _names_placement(node):
            continue
        args, kwargs = node.meta.setdefault("captured_args", (node.args, node.kwargs))

        def place(
            now: Any, said: Any, captured: torch.dtype | None = captured
        ) -> Any:  # pairs of current and captured argument
            if isinstance(said, torch.device) and device is not None:
                return device
            if isinstance(said, torch.dtype) and dtype is not None and said.is_floating_point:
                wide = dtype == torch.float64
                return dtype if said == captured or wide else said
            return now

        new_args = _zip_map(place, node.args, args)
        new_kwargs = _zip_map(place, node.kwargs, kwargs)
        if new_args != node.args or new_kwargs != node.kwargs:
            node.args, node.kwargs = new_args, new_kwargs
            changed = True
    if changed:
        module.recompile()


def _names_placement(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    values = (*node.args, *node.kwargs.values())
    return any(isinstance(value, torch.dtype | torch.device) for value in values)


def _zip_map(place: Any, now: Any, said: Any) -> Any:
    if isinstance(now, tuple):
        return tuple(place(n, s) for n, s in zip(now, said, strict=True))
    return {key: place(value, said[key]) for key, value in now.items()}


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
