"""Attention masks of a graph that is given one token: found, made apart, taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.runtime.tidy import mutates, prune

aten = torch.ops.aten
_ATTEND = aten.scaled_dot_product_attention.default


def fix_tokens(graph: fx.Graph) -> None:
    """Write 1 where the graph reads the second dimension of its first input."""
    first = _first(graph)
    for node in list(first.users):
        if node.target is not aten.sym_size.int or node.args[1] != 1:
            continue
        for user in list(node.users):
            _replace(user, node, 1)
        graph.erase_node(node)


def masks_of(graph: fx.Graph) -> list[fx.Node]:
    """The masks of all attention calls, each once.

    Empty where there are none, where the graph writes in place, or where making them reads weights,
    routed modules or the tokens: making them twice would cost more than leaving them out saves.
    """
    if mutates(graph):
        return []
    found = [m for node in _attention(graph) if isinstance(m := _mask_of(node), fx.Node)]
    masks = list(dict.fromkeys(found))
    first = _first(graph)
    seen: set[fx.Node] = set()
    stack = list(masks)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is first or node.op not in ("call_function", "placeholder"):
            return []
        if node.target is not aten.sym_size.int:
            stack.extend(node.all_input_nodes)
    return masks


def keep_masks(graph: fx.Graph) -> None:
    """Give the masks instead of the outputs; nothing else is computed."""
    output = graph.output_node()
    output.args = (tuple(masks_of(graph)),)
    used: set[fx.Node] = {output}
    for node in reversed(graph.nodes):
        if node in used:
            used.update(node.all_input_nodes)
        elif node.op != "placeholder":  # torch's dead code elimination would keep attention
            graph.erase_node(node)


def drop_masks(graph: fx.Graph) -> None:
    """Attention without masks: what it computes where all of them are open."""
    for node in _attention(graph):
        node.args = node.args[:3] + ((None, *node.args[4:]) if len(node.args) > 4 else ())
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
    prune(graph)


def _replace(user: fx.Node, was: fx.Node, number: int) -> None:
    """Let ``user`` read a number where it read the node ``was``."""

    def read(node: fx.Node) -> Any:
        return number if node is was else node

    user.args, user.kwargs = fx.map_arg(user.args, read), fx.map_arg(user.kwargs, read)


def _first(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(node for node in graph.nodes if node.op == "placeholder")
    return first


def _attention(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target is _ATTEND]


def _mask_of(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
