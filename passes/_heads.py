"""What a head is worth for a token, and how a router can tell.

Shapes: T calibration tokens, H heads of dv value features, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.regions import Attention


def output_blocks(attention: Attention) -> Tensor:
    """(H, dv, D): the output projection's columns of each head, transposed."""
    return attention.output.weight.float().T[attention.output_columns]


def head_energy(attention: Attention) -> Tensor:
    """(T, H): squared norm of what a token loses if a head gives its mean instead.

    Without samples (1, H): the norms of the output blocks stand for it.
    """
    blocks = output_blocks(attention)
    context = attention.samples.get("context")
    if context is None:
        return blocks.square().sum((1, 2))[None]
    heads = context.float()[:, attention.output_columns]  # (T, H, dv)
    centred = heads - heads.mean(0)
    gram = blocks @ blocks.transpose(1, 2)
    return torch.einsum("thi,hij,thj->th", centred, gram, centred)


def head_means(attention: Attention) -> Tensor:
    """(H, D): each head's mean output over the calibration tokens."""
    mean = attention.samples["context"].float().mean(0)[attention.output_columns]
    return torch.einsum("hi,hid->hd", mean, output_blocks(attention))


def head_scores(attention: Attention) -> Tensor:
    """(H, D): router weights without calibration data: the mean query row of each head.

    Weak (no data says which heads matter for a token), but deterministic and cheap.
    """
    if attention.query_rows is None:
        return output_blocks(attention).mean(1) @ torch.eye(
            attention.output.weight.shape[0], attention.width
        )
    return attention.projection.weight.float()[attention.query_rows].mean(1)
