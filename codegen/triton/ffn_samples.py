"""Routed feed-forward layers that the kernels' traffic is counted on."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.codegen.triton.traffic import Sample

SILU = (
    '{"inputs":["up","gate"],"steps":[["up_0","aten.silu.default",{"$tuple":[{"$ref":"gate"}]},'
    '{"$dict":{}}],["up_1","aten.mul.Tensor",{"$tuple":[{"$ref":"up_0"},{"$ref":"up"}]},'
    '{"$dict":{}}]],"output":"up_1","wide":false}'
)
_HALF = torch.float16


def _layer(
    tokens: int, experts: int, m: int, d: int, keep: int
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """x, select, (up, gate, down) and live experts; a quarter is dead for every token."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    scores[:, : experts // 4] = -1
    select = torch.zeros(tokens, experts).scatter_(1, scores.topk(keep).indices, 1.0)
    weights = [torch.zeros(experts, m, d, dtype=_HALF) for _ in range(3)]
    live = int((select != 0).any(0).sum())
    return torch.zeros(tokens, d, dtype=_HALF), select.to(_HALF), weights, live


def _forward(
    tokens: int, experts: int, m: int, d: int, keep: int, names: tuple[str, str]
) -> Sample:
    """Half types, gated, a bias on the outputs; ``names`` of the two products' kernels."""
    from sparsify.codegen.triton.ffn_ops import routed_ffn

    x, select, (up, gate, down), live = _layer(tokens, experts, m, d, keep)
    bias = torch.zeros(d, dtype=_HALF)
    weight, stream = live * m * d * 2, tokens * d * 2
    chosen, neurons, y = select.numel() * 2, tokens * keep * m * 2, tokens * d * 4
    return Sample(
        lambda: routed_ffn(x, select, up, gate, down, None, None, bias, SILU, keep),
        stream + chosen + 3 * weight + d * 2 + y,
        between=2 * neurons,
        own={
            names[0]: stream + 2 * weight + neurons,
            names[1]: neurons + chosen + weight + d * 2 + y,
        },
    )


def prefill() -> Sample:
    """The layer of SmolLM2-135M as 8 experts, half of them for each token, at 64 tokens."""
    return _forward(64, 8, 192, 576, 4, ("ffn_hidden", "ffn_scatter"))


def decode(tokens: int) -> Sample:
    """16 experts of 64 neurons at a width of 576, a quarter of them for each token."""
    return _forward(tokens, 16, 64, 576, 4, ("decode_hidden", "decode_down"))


def backward() -> Sample:
    """8 experts of 64 neurons at a width of 320, half of them for each token, at 64 tokens."""
    from sparsify.codegen.triton.ffn_ops import routed_ffn_backward

    tokens, experts, m, d, keep = 64, 8, 64, 320, 4
    x, select, (up, gate, down), live = _layer(tokens, experts, m, d, keep)
    dy = torch.zeros(tokens, d)
    weight, stream = live * m * d * 2, tokens * d * 2
    chosen, neurons, gradient = select.numel() * 2, tokens * keep * m * 2, experts * m * d * 2
    return Sample(
        lambda: routed_ffn_backward(dy, x, select, up, gate, down, None, None, SILU, keep),
        stream + dy.numel() * 4 + chosen + 3 * weight + stream + chosen + 3 * gradient,
        between=2 * 3 * neurons,
        own={
            "ffn_gradient": 2 * stream + chosen + 3 * weight + 3 * neurons,
            "ffn_scatter": 2 * neurons + chosen + 2 * weight + stream,
            "ffn_outer": 3 * neurons + 3 * stream + 3 * gradient,
        },
        why="up and gate of live experts are read twice, since the gradient of x needs the"
        " gradients at all neurons; x, dy and these gradients are read again for those of weights;"
        " dy is float32, and rounded to the type of x before",
    )
