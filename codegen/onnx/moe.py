"""Experts as one operator of ONNX Runtime's: com.microsoft ``MoE``.

Its CPU kernel takes router logits, keeps the ``k`` experts of the largest softmax, and multiplies
an expert's output by its share. It computes an expert on the tokens whose share of it is above
zero, and reads the weights of no other, even with ``k`` = all (2048/8192 in 64 experts, one token,
one thread: 16.1, 8.0 and 2.0 ms with 64, 32 and 8 of them at a logit of 0, the others at -1e9). So
any selection, by count or by threshold, is the logits ``log(weight)`` where live and far below
where dead, ``k`` = all; shares are the weights over their sum, which the result is multiplied by.

The kernel has one gated activation, ``silu(gate) * up`` with the two interleaved, and four plain
ones; which of them a layer has is found by trying (:func:`activation_of`). Its products read
weights as they lie (the dense layer's are packed when the file is loaded), so it is slower than
dense at 8 tokens, and than :mod:`sparsify.codegen.onnx.branches` wherever experts are few and
large; for many small experts and one token it is the fastest (README, section ONNX). Two threads
share out the experts, live or not: more experts, evener work. With weights in 8 or 4 bits it
becomes another operator (:mod:`sparsify.codegen.onnx.qmoe`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsify.runtime.program import Program

DOMAIN = "com.microsoft"
DEAD = -1e9  # below any other logit by this: a share of exactly zero
GATED = "swiglu"
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}


def activation_of(program: Program) -> str | None:
    """The kernel's name for an elementwise program on (up,) or (up, gate); None: it has none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, -200.0, 200.0])])
    up = torch.randn(x.shape, generator=generator)
    if len(program.inputs) == 2:
        known = {GATED: nn.functional.silu(x) * up}
        found = program(up, x)
    else:
        known = {name: plain(x) for name, plain in PLAIN.items()}
        found = program(x)
    for name, expected in known.items():
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return name
    return None


def first_layer(up: Tensor, gate: Tensor | None) -> Tensor:
    """up, gate (N, m, ...) -> (N, m, ...), or (N, 2 m, ...) with a gate: gate, up, gate, up."""
    return up.clone() if gate is None else torch.stack([gate, up], 2).flatten(1, 2)


def experts(
    x: Tensor,
    weights: Tensor,
    first: Tensor,
    bias: Tensor | None,
    down: Tensor,
    activation: str,
    *,
    weigh: bool,
) -> Tensor:
    """The weighted sum of live experts.

    Args:
        x: (T, D); weights: (T, N), at least zero, 0 where an expert is dead.
        first, bias: (N, m or 2 m, D) and (N, m or 2 m) of :func:`first_layer`.
        down: (N, D, m).
        activation: of :func:`activation_of`.
        weigh: False where the weights of live experts are one.

    Returns:
        (T, D), zero where no expert is live.
    """
    if not torch.compiler.is_exporting():
        return _eager(x, weights, first, bias, down, activation)
    inputs = (x, logits_of(weights, weigh=weigh), first, bias, down)
    gated = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    shares: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::MoE",
        inputs,
        {
            "k": weights.shape[1],
            "activation_type": activation,
            "normalize_routing_weights": 0,
            **(gated if activation == GATED else {}),
        },
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, shares * total, 0.0)


def logits_of(weights: Tensor, *, weigh: bool) -> Tensor:
    """weights (T, N) -> logits (T, N) whose softmax is the weights over their sum.

    No two dead experts have the same logit: where none is live, the first alone is computed, and
    its share counts for nothing. (With one logit for all, a token without experts costs all.)
    """
    dead = DEAD * torch.arange(1, weights.shape[1] + 1, dtype=weights.dtype)
    if weigh:
        return torch.where(weights > 0, weights.log(), dead)
    return (1 - weights) * dead


def _eager(
    x: Tensor, weights: Tensor, first: Tensor, bias: Tensor | None, down: Tensor, activation: str
) -> Tensor:
    sums = torch.einsum("td,nfd->tnf", x, first)
    sums = sums if bias is None else sums + bias
    if activation == GATED:
        hidden = nn.functional.silu(sums[..., 0::2]) * sums[..., 1::2]
    else:
        hidden = PLAIN[activation](sums)
    each = torch.einsum("tnm,ndm->tnd", hidden, down)
    kept = (each * weights.unsqueeze(-1)).masked_fill(weights.unsqueeze(-1) == 0, 0.0)
    return kept.sum(1)
