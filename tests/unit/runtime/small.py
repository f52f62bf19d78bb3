"""A small causal language model and a routed graph that need no transformers, for these tests."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from sparsify.runtime.calling import CausalCall, ModuleCall, Slot
from sparsify.runtime.graph import assemble, attach
from sparsify.runtime.model import SparseModel
from tests.unit.runtime.examples import Dense

aten = torch.ops.aten
VOCABULARY, WIDTH = 20, 4


def causal(*, seed: int = 0) -> SparseModel:
    """A one-layer "cache of embeddings" language model as a graph: ids, mask, key, value.

    The cache holds embeddings of all tokens; a token's logits come from the masked running mean.
    """
    g = torch.Generator().manual_seed(seed)
    root = nn.Module()
    embed = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=g))
    attach(root, "embed.weight", embed)
    attach(root, "head.weight", embed)  # tied
    graph = fx.Graph()
    ids, mask = graph.placeholder("input_ids"), graph.placeholder("attention_mask")
    key, value = graph.placeholder("past_0_key"), graph.placeholder("past_0_value")

    def call(op: object, *args: object) -> fx.Node:
        return graph.call_function(op, args)  # type: ignore[arg-type]

    rows = call(aten.embedding.default, graph.get_attr("embed.weight"), ids)
    heads = call(aten.unsqueeze.default, rows, 1)  # (B, 1, T, d)
    keys = call(aten.cat.default, [key, heads], 2)
    values = call(aten.cat.default, [value, heads], 2)
    count = call(aten.sym_size.int, ids, 1)
    past = call(aten.sym_size.int, key, 2)
    weights = call(aten.unsqueeze.default, call(aten.unsqueeze.default, mask, 1), 3)
    sums = call(aten.cumsum.default, call(aten.mul.Tensor, values, weights), 2)
    seen = call(aten.clamp_min.default, call(aten.cumsum.default, weights, 2), 1)
    mean = call(aten.narrow.default, call(aten.div.Tensor, sums, seen), 2, past, count)
    flat = call(aten.squeeze.dim, mean, 1)
    logits = call(aten.linear.default, flat, graph.get_attr("head.weight"))
    graph.output((logits, keys, values))
    cache = (None, 1, None, WIDTH)
    slots = (
        Slot("input_ids", (None, None)),
        Slot("attention_mask", (None, None)),
        Slot("past_0_key", cache, (), True),
        Slot("past_0_value", cache, (), True),
    )
    spec = CausalCall(slots, None, True, ((1, WIDTH, WIDTH),), VOCABULARY, model="Small")
    module = assemble(graph, root)
    module.meta["dtype"] = torch.float32
    example = tuple(spec.inputs(torch.arange(6).reshape(2, 3)))
    with torch.no_grad():
        golden = module(*example)
    return SparseModel(module, spec, example=example, golden=golden)


def routed(*, dropped: bool = True) -> SparseModel:
    """``linear -> routed feed-forward -> linear`` on (B, 12) inputs, with a buffer of each kind."""
    layer = Dense(dropped=dropped, dtype=torch.float32)
    root = nn.Module()
    width = layer.width
    attach(root, "first.weight", nn.Parameter(torch.randn(width, width)))
    attach(root, "blocks.0.mlp", layer.routed())
    attach(root, "scale", torch.tensor(2.0))
    attach(root, "shift", torch.tensor(0.5), persistent=False)
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.linear.default, (x, graph.get_attr("first.weight")))
    inner = graph.call_module("blocks.0.mlp", (first,))
    scaled = graph.call_function(aten.mul.Tensor, (inner, graph.get_attr("scale")))
    graph.output((graph.call_function(aten.add.Tensor, (scaled, graph.get_attr("shift"))),))
    spec = ModuleCall(
        (Slot("x", (None, width), (None, None), True),),
        ("x",),
        {"x": {"kind": "tensor"}},
        {"kind": "dict", "items": {"y": {"kind": "tensor"}}},
        "Small",
    )
    module = assemble(graph, root)
    module.meta["dtype"] = torch.float32
    example = (torch.randn(3, width),)
    with torch.no_grad():
        golden = module(*example)
    model = SparseModel(module, spec, pipeline="ffn-moe", example=example, golden=golden)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def alone(model: SparseModel, ids: Tensor, steps: int) -> Tensor:
    """Greedy continuation without cache or batching: the meaning of generate()."""
    rows = []
    for row in ids:
        text = row[None]
        for _ in range(steps):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
        rows.append(text[0])
    return torch.stack(rows)
