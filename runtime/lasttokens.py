"""The graph that computes logits of the last tokens only, as transformers' prefill does.

The head of a small model is a fifth of its work, and at prefill one row of its result is wanted.
The captured graph computes all; here a slice is put before the head, where all that follows the
head treats every token alike.
"""

from __future__ import annotations

import operator
import sys

import torch
from torch import Tensor, fx

from sparsify.runtime.graph import assemble

aten = torch.ops.aten

# What may follow the head: one tensor in, the same for every token.
_PER_ELEMENT = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten.clamp.default,
    aten.contiguous.default,
    aten.alias.default,
}


def last_tokens(module: fx.GraphModule) -> fx.GraphModule | None:
    """``module`` with one more input ``keep`` (an int), and logits (B, keep, V).

    Shares all weights with ``module``. None where the head is not found.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, values))
    head = _head(graph)
    if head is None:
        return None
    hidden = head.args[0]
    assert isinstance(hidden, fx.Node)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        keep = graph.placeholder("keep_last")
    with graph.inserting_before(head):
        start = graph.call_function(operator.neg, (keep,))
        rows = graph.call_function(aten.slice.Tensor, (hidden, 1, start, sys.maxsize))
    head.replace_input_with(hidden, rows)
    return assemble(graph, module)


def _head(graph: fx.Graph) -> fx.Node | None:
    """The projection whose result, through elementwise operations, are the logits."""
    node = graph.output_node().args[0][0]  # type: ignore[index]
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is aten.linear.default:
            value = node.args[0]
            weights = node.args[1:]
            plain = all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights if w)
            return node if plain and isinstance(value, fx.Node) else None
        if node.target not in _PER_ELEMENT or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


class LastTokens:
    """Keeps the graph of :func:`last_tokens` as long as the model's graph does not change."""

    def __init__(self) -> None:
        self._code: str | None = None
        self._graph: fx.GraphModule | None = None

    def run(self, module: fx.GraphModule, flat: list[Tensor], keep: int) -> tuple[Tensor, ...]:
        """Outputs of ``module`` with logits of the last ``keep`` tokens."""
        if self._code is not module.code:  # a new text object after every recompile
            self._code, self._graph = module.code, last_tokens(module)
        if self._graph is None:
            logits, *cache = module.forward(*flat)
            return (logits[:, -keep:], *cache)
        outputs: tuple[Tensor, ...] = self._graph.forward(*flat, keep)
        return outputs

    def __deepcopy__(self, memo: dict[int, object]) -> LastTokens:
        return LastTokens()
