"""Inlining of torch.export's wrappers: regions without gradients, and regions without autocast."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import CaptureFailed
from sparsify.runtime.graph import attach

aten = torch.ops.aten


def inline_wrappers(module: fx.GraphModule) -> bool:
    """Inline ``wrap_with_set_grad_enabled`` and ``wrap_with_autocast``; True if any was found."""
    found = False
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *operands = node.args
            _inline(module, node, body, operands, detach=not enabled, fp32=False)
        elif name == "wrap_with_autocast":
            _device, _dtype, enabled, _cache, body, *operands = node.args
            if enabled:
                raise CaptureFailed(
                    "the model switches autocast on inside its forward",
                    help="remove torch.autocast from the model; cast it as a whole instead",
                )
            _inline(module, node, body, operands, detach=False, fp32=True)
        else:
            continue
        found = True
    if found:
        module.graph.eliminate_dead_code()
    return found


def _inline(
    module: fx.GraphModule,
    call: fx.Node,
    body: fx.Node,
    operands: Sequence[fx.Node],
    *,
    detach: bool,
    fp32: bool,
) -> None:
    inner: Any = operator.attrgetter(str(body.target))(module)
    values: dict[fx.Node, Any] = {}
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    values.update(zip(placeholders, operands, strict=True))
    trained = detach and any(_depends_on_parameter(module, operand) for operand in operands)
    outputs: Any = ()
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                outputs = fx.map_arg(node.args[0], lambda n: values[n])
                continue
            copy = module.graph.node_copy(node, lambda n: values[n])
            if node.op == "get_attr" and not _has(module, str(node.target)):
                attach(module, str(node.target), operator.attrgetter(str(node.target))(inner))
            if fp32:
                _shield_from_autocast(copy)
            values[node] = copy
        single = isinstance(outputs, fx.Node)
        results = [outputs] if single else list(outputs)
        if trained:  # the region computed without gradients must stay so
            results = [
                module.graph.call_function(aten.detach.default, (r,))
                if isinstance(r, fx.Node) and isinstance(r.meta.get("val"), Tensor)
                else r
                for r in results
            ]
    if single:
        call.replace_all_uses_with(results[0])
    else:
        for user in list(call.users):
            user.replace_all_uses_with(results[int(str(user.args[1]))])
            module.graph.erase_node(user)
    module.graph.erase_node(call)


def _shield_from_autocast(node: fx.Node) -> None:
    """Spell an outer product as a broadcast multiply, which autocast leaves alone.

    Rotary embeddings compute ``frequencies (.., n, 1) @ positions (.., 1, T)`` with autocast off.
    Inlined, a caller's autocast would run that matmul in bfloat16, where position 257 is 256. With
    an inner size of 1 the product has one term, so the multiply is bit-identical.
    """
    if node.target not in (aten.matmul.default, aten.bmm.default):
        return
    left, right = (arg.meta.get("val") if isinstance(arg, fx.Node) else None for arg in node.args)
    if (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and min(left.ndim, right.ndim) >= 2
        and isinstance(left.shape[-1], int)
        and left.shape[-1] == 1
    ):
        node.target = aten.mul.Tensor


def _depends_on_parameter(module: fx.GraphModule, node: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            value = operator.attrgetter(str(current.target))(module)
            if isinstance(value, nn.Parameter):
                return True
        stack.extend(current.all_input_nodes)
    return False


def _has(module: nn.Module, target: str) -> bool:
    try:
        operator.attrgetter(target)(module)
    except AttributeError:
        return False
    return True
