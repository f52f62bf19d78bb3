"""From torch.export's module to the plain graph that every later part works on.

Flat placeholders with the caller's names, a flat tuple output, plain code; no assertions, no
grad-mode or autocast wrappers, no casts or dropouts that do nothing; parameter names are the
model's own. What is removed is removed only where it provably does nothing at the captured dtype.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.capture.wrappers import inline_wrappers
from sparsify.runtime.graph import assemble, attach
from sparsify.runtime.precision import CASTS

aten = torch.ops.aten

_ASSERTIONS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
    "aten::_functional_assert_async",
}
_END = sys.maxsize


def normalise(
    exported: fx.GraphModule, names: Sequence[str], prefix: str, model: nn.Module | None
) -> fx.GraphModule:
    """The plain graph of an exported module.

    Args:
        exported: ``ExportedProgram.module(check_guards=False)``.
        names: a name for every flat input, in order.
        prefix: the attribute under which the wrapper held the model (stripped from all names).
        model: the original model: its own parameters and buffers are used, not copies.
    """
    graph = exported.graph
    while inline_wrappers(exported):
        pass
    for node in list(graph.nodes):
        if _is_assertion(node):
            graph.erase_node(node)
    for node in list(graph.nodes):
        same = _does_nothing(node)
        if same is not None:
            _mark_cast(node, same)
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in graph.nodes:
        node.target = _SPELLING.get(node.target, node.target)
    graph.eliminate_dead_code()
    return _rebuild(exported, names, prefix, model)


# ---------------------------------------------------------------------------- no-ops


def _is_assertion(node: fx.Node) -> bool:
    if node.op == "call_module" and str(node.target).startswith("_guards_fn"):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name in _ASSERTIONS
    return getattr(node.target, "__module__", "") == "torch" and getattr(
        node.target, "__name__", ""
    ) in {"_check", "_check_is_size", "sym_constrain_range_for_size"}


def _does_nothing(node: fx.Node) -> fx.Node | None:
    """The input that ``node`` returns unchanged, or None."""
    rule = _IDENTITY.get(node.target) if node.op == "call_function" else None
    if rule is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if rule(node) else None


def _mark_cast(node: fx.Node, same: fx.Node) -> None:
    """Remember on the users of a removed float cast that they read through one.

    It does nothing at the captured dtype, but may at another (see sparsify.runtime.precision).
    """
    value = node.meta.get("val")
    casts = _IDENTITY.get(node.target) is _same_placement or same in node.meta.get(CASTS, ())
    if casts and isinstance(value, Tensor) and value.is_floating_point():
        home = f"{_path(node, '')}."
        made_here = f"{_path(same, '')}.".startswith(home)
        for user in node.users:
            # A cast that does nothing returns its input. Of a module that casts what it was given,
            # the input leaks: code after it (a residual addition) seems to read the cast value.
            if made_here or f"{_path(user, '')}.".startswith(home):
                user.meta[CASTS] = (*user.meta.get(CASTS, ()), same)


def _same_placement(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta.get("val"), node.meta.get("val")
    copies = node.kwargs.get("copy") is True or (
        node.target is aten.to.dtype and len(node.args) > 3 and node.args[3] is True
    )
    return bool(
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and before.layout == after.layout
        and not copies
        and node.kwargs.get("memory_format") is None
        and not _written_in_place(node)
    )


def _whole_slice(node: fx.Node) -> bool:
    padded = (*node.args, *(None,) * (5 - len(node.args)))
    _, _dim, start, end, step = padded
    return bool(start in (0, None) and end in (_END, None) and step in (1, None))


def _no_dropout(node: fx.Node) -> bool:
    _, probability, training = node.args
    return bool(probability == 0.0 or training is False)


def _constant(node: fx.Node) -> bool:
    """A fresh copy or detach of a constant that nothing writes to."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.op == "get_attr" and not _written_in_place(node)


def _written_in_place(node: fx.Node) -> bool:
    return any(
        isinstance(user.target, torch._ops.OpOverload)
        and user.target._schema.is_mutable
        and user.target is not aten.detach_.default
        and user.args[:1] == (node,)
        for user in node.users
    )


_IDENTITY: dict[Any, Callable[[fx.Node], bool]] = {
    aten.to.dtype: _same_placement,
    aten.to.device: _same_placement,
    aten.to.dtype_layout: _same_placement,
    aten.to.other: _same_placement,
    aten.type_as.default: _same_placement,
    aten.slice.Tensor: _whole_slice,
    aten.dropout.default: _no_dropout,
    aten.feature_dropout.default: _no_dropout,
    aten.lift_fresh_copy.default: _constant,
    aten.detach_.default: _constant,
}


# Python's operators have a second name in ATen; one spelling is enough for every later part.
_SPELLING: dict[Any, Any] = {
    getattr(getattr(aten, f"__{name}__"), overload): getattr(getattr(aten, plain), overload)
    for name, plain in {
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
        "lshift": "bitwise_left_shift",
        "rshift": "bitwise_right_shift",
    }.items()
    for overload in ("Tensor", "Scalar")
    if hasattr(getattr(aten, plain), overload)
}
# A view needs the strides that the dense model's operations happen to give (sdpa's transposed
# result: export drops a `contiguous()` that did nothing there); a routed module gives others.
_SPELLING[aten.view.default] = aten.reshape.default


# ---------------------------------------------------------------------------- the plain graph


def _rebuild(
    exported: fx.GraphModule, names: Sequence[str], prefix: str, model: nn.Module | None
) -> fx.GraphModule:
    """A new graph: placeholders first, weights right before their first use, plain code."""
    root = nn.Module()
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        values[node] = graph.placeholder(name)
        values[node].meta = _meta(node, prefix)
    ties = _ties(model)
    weights: dict[str, fx.Node] = {}

    def weight(node: fx.Node, user: fx.Node) -> fx.Node:
        """A get_attr, made where it is wanted for the first time."""
        target = str(node.target)
        name = target.removeprefix(f"{prefix}.") if prefix else target
        names = ties.get(name, (name,))
        name = _name_for(names, name, _path(user, prefix))
        if name not in weights:
            for alias in names:  # tied names stay tied: one object under all of them
                own, persistent = _original(model, alias)
                tensor = operator.attrgetter(target)(exported) if own is None else own
                attach(root, alias, tensor, persistent)
            weights[name] = graph.get_attr(name)
            weights[name].meta = _meta(node, prefix)
        return weights[name]

    for node in exported.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue

        def value_of(used: fx.Node, user: fx.Node = node) -> fx.Node:
            return weight(used, user) if used.op == "get_attr" else values[used]

        if node.op == "output":
            flat = node.args[0]
            flat = (flat,) if isinstance(flat, fx.Node) else tuple(flat)
            graph.output(tuple(value_of(n) for n in flat)).meta = _meta(node, prefix)
            continue
        copy = values[node] = graph.node_copy(node, value_of)
        copy.meta = _meta(node, prefix)
        through = {value_of(source) for source in node.meta.get(CASTS, ())}
        if through:
            copy.meta[CASTS] = tuple(
                i for i, source in enumerate(copy.all_input_nodes) if source in through
            )
    root.training = False
    result = assemble(graph, root)
    result.graph.lint()
    return result


def _ties(model: nn.Module | None) -> dict[str, tuple[str, ...]]:
    """name -> all names of the same parameter, where it has several."""
    groups: dict[int, list[str]] = {}
    named = model.named_parameters(remove_duplicate=False) if model is not None else ()
    for name, parameter in named:
        groups.setdefault(id(parameter), []).append(name)
    return {n: tuple(names) for names in groups.values() if len(names) > 1 for n in names}


def _name_for(names: Sequence[str], name: str, path: str) -> str:
    """Of a tied parameter's names, the one that belongs to the module at ``path``.

    torch.export merges tied parameters under one of their names; the embedding should still read
    ``embed_tokens.weight`` and the head ``lm_head.weight``.
    """
    owners = {alias.rpartition(".")[0]: alias for alias in names}
    while path:
        if path in owners:
            return owners[path]
        path = path.rpartition(".")[0]
    return name


def _path(node: fx.Node, prefix: str) -> str:
    stack = _meta(node, prefix).get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _original(model: nn.Module | None, name: str) -> tuple[Tensor | None, bool]:
    """The model's own tensor of that name, and whether its state dict holds it."""
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name) if model is not None else None
    except AttributeError:
        owner = None
    if owner is None:
        return None, False
    own: Tensor | None = owner._parameters.get(leaf)
    own = owner._buffers.get(leaf) if own is None else own
    return own, own is not None and leaf not in owner._non_persistent_buffers_set


# Frames of this package, with their source line, in a recorded stack trace.
_OWN_FRAME = re.compile(
    r'^ *File "[^"\n]*[/\\\\]sparsify[/\\\\]capture[/\\\\][^\n]*\n(    [^\n]*\n?)?', re.M
)
_KEPT = ("stack_trace", "nn_module_stack", "val", "torch_fn")


def _meta(node: fx.Node, prefix: str) -> dict[str, Any]:
    meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    if "stack_trace" in meta:
        meta["stack_trace"] = _OWN_FRAME.sub("", meta["stack_trace"])
    stack = meta.get("nn_module_stack")
    if stack and prefix:
        meta["nn_module_stack"] = {
            key: (path.removeprefix(prefix).removeprefix("."), kind)
            for key, (path, kind) in stack.items()
            if path.split(".")[0] == prefix  # drops the wrapper's own entry
        }
    return meta
