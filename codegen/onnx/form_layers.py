"""The form of a layer that runs for some tokens: it runs for all, dead ones keep what they had.

Where live tokens attend to live tokens only, keys of dead ones are masked in every attention of the
layer's body, and their cache entries are zeros, as eager leaves them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.codegen.onnx.form_attention import AttendForm
from sparsify.codegen.onnx.forms import form
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.block_attend import BlockAttend
from sparsify.runtime.depth import RoutedLayer
from sparsify.runtime.graph import assemble
from sparsify.runtime.spans import SpanAttend

aten = torch.ops.aten
_PRODUCTS: dict[Any, int] = {aten.matmul.default: 1, aten.bmm.default: 1, aten.baddbmm.default: 2}
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@form(RoutedLayer)
class LayerForm(RoutedLayer):
    """select (B, T, N), the stream (B, T, D), other inputs -> stream, or (stream, *cache)."""

    def prepare(self) -> None:
        if self.keys is None:
            self.__dict__["body"] = with_dead_keys(self.body)

    def forward(self, select: Tensor, *inputs: Tensor) -> Any:
        x = inputs[0]
        batch, tokens, _ = x.shape
        live = select.expand(batch, tokens, -1)[..., self.unit] != 0
        if self.keys is not None:
            at, dim = self.keys
            out = self.body.forward(batch, tokens, inputs[at].shape[dim] - tokens, *inputs)
            y = out[0] if isinstance(out, tuple | list) else out
            return self._kept(x, y, live)
        known, past = live, 0
        if self.slots:
            at, dim = self.slots[0]
            past = inputs[at].shape[dim]
            entries = inputs[at].movedim(dim, 1)
            known = torch.cat([(entries != 0).flatten(2).any(-1), live], dim=1)
        out = self.body.forward(batch, tokens, past, *inputs, ~known)
        if not self.slots:
            return self._kept(x, out[0] if isinstance(out, tuple | list) else out, live)
        y, *grown = out
        cache = [
            entry.masked_fill(~_along(known, entry.dim(), dim), 0.0)
            for entry, (_, dim) in zip(grown, self.slots, strict=True)
        ]
        return (self._kept(x, y, live), *cache)

    def _kept(self, x: Tensor, y: Tensor, live: Tensor) -> Tensor:
        skipped = x if self.dropped is None else x + self.dropped
        return torch.where(live.unsqueeze(-1), y.to(x.dtype), skipped)


def _along(mask: Tensor, dims: int, dim: int) -> Tensor:
    """(B, K) as it broadcasts to an entry of ``dims`` dimensions with the keys at ``dim``."""
    shape = [1] * dims
    shape[0], shape[dim] = mask.shape
    return mask.reshape(shape)


def with_dead_keys(body: fx.GraphModule) -> fx.GraphModule:
    """``body`` with one more input, bool (B, K): keys that no query attends to."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(body.graph, values))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        dead = graph.placeholder("dead_keys")
    stream = inputs[3]  # after three sizes
    for node in list(graph.nodes):
        keys = _keys_of(node)
        if keys is None or not _reads(keys, stream):  # no attention, or over an encoder's keys
            continue
        if node.op == "call_module":
            module = body.get_submodule(str(node.target))
            if isinstance(module, SpanAttend | BlockAttend):
                raise Refused(
                    f"{type(module).__name__} counts the tokens that are live",
                    suggestion="depth routing with kv=all, or without attention over spans or"
                    " blocks",
                )
            if isinstance(module, RoutedAttend):
                assert isinstance(module, RoutedAttend | AttendForm)
                node.kwargs = {**node.kwargs, "dead": dead}
        elif node.target is aten.scaled_dot_product_attention.default:
            with graph.inserting_before(node):
                made = graph.call_function(_attend, (dead, *node.args), dict(node.kwargs))
            node.replace_all_uses_with(made)
            graph.erase_node(node)
        elif node.target in _SOFTMAX:
            with graph.inserting_before(node):
                masked = graph.call_function(_masked, (dead, node.args[0]))
            node.args = (masked, *node.args[1:])
    return assemble(graph, body)


def _keys_of(node: fx.Node) -> fx.Node | None:
    """The keys that an attention, or a softmax over scores, reads; None for other nodes."""
    found: Any = None
    if node.op == "call_module" or node.target is aten.scaled_dot_product_attention.default:
        found = node.args[1] if len(node.args) > 2 else None
    elif node.target in _SOFTMAX:
        product = next((n for n in _before(node) if n.target in _PRODUCTS), None)
        found = None if product is None else product.args[_PRODUCTS[product.target]]
    return found if isinstance(found, fx.Node) else None


def _reads(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` depends on ``source``."""
    return any(at is source for at in _before(node))


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what it depends on, the nearest first."""
    seen, queue = {node}, deque([node])
    while queue:
        at = queue.popleft()
        yield at
        new = [source for source in at.all_input_nodes if source not in seen]
        seen.update(new)
        queue.extend(new)


def _masked(dead: Tensor, scores: Tensor) -> Tensor:
    """Scores (B, H, T, K) of attention that the model spells out."""
    if scores.dim() == 3:  # nn.MultiheadAttention: (B * H, T, K)
        heads = scores.shape[0] // dead.shape[0]
        return scores.masked_fill(dead.repeat_interleave(heads, dim=0)[:, None, :], -math.inf)
    if scores.dim() != 4:
        return scores
    return scores.masked_fill(dead[:, None, None, :], -math.inf)


def _attend(
    dead: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    live = ~dead[:, None, None, :]
    if is_causal:
        tokens, keys = q.shape[2], k.shape[2]
        place = torch.arange(tokens, device=q.device).unsqueeze(1)
        live = live & (torch.arange(keys, device=q.device) <= place)
    if attn_mask is None:
        mask = live.expand(-1, -1, q.shape[2], -1)
    elif attn_mask.dtype == torch.bool:
        mask = attn_mask & live
    else:
        mask = attn_mask.masked_fill(~live, -math.inf)
    found: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, scale=scale, enable_gqa=enable_gqa
    )
    return found
