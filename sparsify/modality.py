"""Inputs of the graph that say, token by token, what kind of token it is.

Two ports of a region come from here: ``input.NAME`` for every integer input with one value per row
of the region's x (modality ids may be given so), and ``tokens``, the one that token embeddings are
looked up with.
"""

from __future__ import annotations

import torch
from torch import fx

from sparsify.probe import is_cast, is_identity, is_movement, op_base, shape_of

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def token_inputs(gm: fx.GraphModule) -> tuple[list[fx.Node], fx.Node | None]:
    """(integer inputs with two dimensions, the one that an embedding reads, if it is one)."""
    found = [
        node
        for node in gm.graph.nodes
        if node.op == "placeholder"
        and node.meta.get("dtype") in INTEGERS
        and len(shape_of(node)) == 2
    ]
    sources = [
        _before(node.args[1])
        for node in gm.graph.nodes
        if node.op == "call_function" and op_base(node) == "embedding"
    ]
    reads = [node for node in found if node in sources]
    # position and type ids are looked up too: whose table is the largest holds the vocabulary
    largest = max(reads, key=lambda n: (_rows(n), -int(n.meta["order"])), default=None)
    return found, largest


def _before(node: object) -> fx.Node | None:
    while isinstance(node, fx.Node) and (is_cast(node) or is_identity(node) or is_movement(node)):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _rows(source: fx.Node) -> int:
    """Rows of the largest table that is looked up with ``source``."""
    sizes, stack = [0], [source]
    while stack:
        for user in stack.pop().users:
            if op_base(user) == "embedding":
                sizes.append(shape_of(user.args[0])[0])  # type: ignore[arg-type]
            elif is_cast(user) or is_identity(user) or is_movement(user):
                stack.append(user)
    return max(sizes)


def modality_ports(x: fx.Node, inputs: list[fx.Node], tokens: fx.Node | None) -> dict[str, fx.Node]:
    """The ports of a region with input ``x`` (B, T, D): inputs that have x's rows."""
    rows = shape_of(x)[:-1]
    fitting = [node for node in inputs if shape_of(node) == rows]
    ports = {f"input.{node.name}": node for node in fitting}
    return ports | ({"tokens": tokens} if tokens in fitting and tokens is not None else {})
