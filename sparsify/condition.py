"""The conditioning vector of a block: what scales and shifts its tokens, one value per sample.

Diffusion transformers modulate a block's input, ``x = norm(h) * (1 + scale(c)) + shift(c)`` (adaLN,
Peebles & Xie, arXiv:2212.09748), with a vector ``c`` made of the noise level (and the class). It is
told by its role alone: walking up from x through elementwise nodes, an operand with one row per
sample, where x has one per token, that comes from a projection; c is what that projection reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sparsify.linears import Linear
from sparsify.probe import is_movement, is_pointwise, shape_of


def condition_of(x: fx.Node, linears: Mapping[fx.Node, Linear]) -> fx.Node | None:
    """The (B, C) node that modulates ``x`` (B, ..., D); the nearest, or None where there is none.

    Args:
        x: input of a region.
        linears: all projections by their result.
    """
    shape = shape_of(x)
    if len(shape) < 3:
        return None
    seen: set[fx.Node] = set()
    level = [x]
    while level:
        above: list[fx.Node] = []
        for node in level:
            if node in seen or node in linears or not is_pointwise(node):
                continue
            seen.add(node)
            for operand in node.all_input_nodes:
                if shape_of(operand) == shape:
                    above.append(operand)
                elif _per_sample(operand, shape):
                    found = _source(operand, linears)
                    if found is not None and _is_vector(found, shape[0]):
                        return found
        level = above
    return None


def _per_sample(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """One row of D (or one) features per sample, broadcast over the tokens of ``shape``."""
    own = shape_of(node)
    return (
        len(own) == len(shape)
        and own[0] == shape[0]
        and own[-1] in (1, shape[-1])
        and all(size == 1 for size in own[1:-1])
        and any(size > 1 for size in shape[1:-1])
    )


def _source(node: fx.Node, linears: Mapping[fx.Node, Linear]) -> fx.Node | None:
    """What the nearest projection above ``node`` reads, through elementwise nodes and moves."""
    seen: set[fx.Node] = set()
    level = [node]
    while level:
        above: list[fx.Node] = []
        for walk in level:
            if walk in linears:
                return linears[walk].x
            if walk not in seen and (is_movement(walk) or is_pointwise(walk)):
                seen.add(walk)
                above.extend(walk.all_input_nodes)
        level = above
    return None


def _is_vector(node: fx.Node, batch: int) -> bool:
    """(B, C), or (B, 1, ..., C)."""
    shape = shape_of(node)
    return len(shape) >= 2 and shape[0] == batch and all(size == 1 for size in shape[1:-1])
