"""Cleanups of a graph that is about to run: fewer operations, bit for bit the same results.

A captured graph says what the model said. Some of that is work for nothing on a CPU: keys and
values repeated for every query head that shares them, the same view taken anew in every layer, two
slices, a negation and a copy to rotate by half. Each function here finds one such pattern by its
structure, rewrites it in place and returns how many it found. They work on the copy that
:mod:`sparsify.runtime.straight` runs; the model's graph, which reports, passes and export read,
stays as it was captured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_ATTEND = aten.scaled_dot_product_attention.default


def tidy(graph: fx.Graph, tokens: int | None = None) -> dict[str, int]:
    """All cleanups, in order; what was done and how often.

    Args:
        tokens: the number of new tokens where it is known; only 1 allows more.
    """
    done: dict[str, int] = {}
    if mutates(graph):
        return done  # the order of reads and writes would have to be kept
    steps: dict[str, Callable[[fx.Graph], int]] = {
        "keys and values read without repeating them": shared_keys,
        "halves rotated in one operation": rolled,
        "equal operations run once": merged,
    }
    if tokens == 1:
        steps["views of one token taken at once"] = flattened
    for what, step in steps.items():
        count = step(graph)
        if count:
            done[what] = count
            prune(graph)
    return done


def mutates(graph: fx.Graph) -> bool:
    """Whether an operation writes into a tensor."""
    targets = [node.target for node in graph.nodes]
    return any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


def prune(graph: fx.Graph) -> None:
    """Drop operations that nobody reads; modules stay (they count), and what draws random numbers.

    (torch's own way wants a graph that belongs to a module.)
    """
    for node in reversed(graph.nodes):
        pure = node.op == "get_attr" or (node.op == "call_function" and _pure(node.target))
        if pure and not node.users:
            graph.erase_node(node)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


# ---------------------------------------------------------------------------- keys and values


def shared_keys(graph: fx.Graph) -> int:
    """``attention(q, repeat(k), repeat(v))`` -> ``attention(q, k, v, enable_gqa=True)``.

    torch's fused attention for CPUs reads a key/value head in place for each query head of its
    group and computes what it computed on the copies. (On CUDA a mask beside ``enable_gqa`` takes
    the slow path: this is for graphs that run on a CPU.)
    """
    count = 0
    for node in graph.nodes:
        if not _is(node, _ATTEND) or len(node.args) < 3 or node.kwargs.get("enable_gqa"):
            continue
        key, value = (_unrepeated(a) for a in node.args[1:3])
        if key is None or value is None or key[1:] != value[1:]:
            continue
        node.args = (node.args[0], key[0], value[0], *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        count += 1
    return count


def _unrepeated(node: Any) -> tuple[fx.Node, int, int] | None:
    """(B, G, S, d) behind a (B, G*R, S, d) that repeats each head R times, with G and R."""
    if not _is(node, aten.reshape.default) or not _is(node.args[0], aten.expand.default):
        return None
    new, expand = node.args[1], node.args[0]
    source, sizes = expand.args[0], expand.args[1]
    if not _is(source, aten.unsqueeze.default) or source.args[1] not in (2, -3):
        return None
    if len(sizes) != 5 or len(new) != 4:
        return None
    batch, groups, times, keys, width = sizes
    if not isinstance(groups, int) or not isinstance(times, int) or groups < 1 or times < 2:
        return None
    if list(new) != [batch, groups * times, keys, width]:
        return None
    return source.args[0], groups, times


# ---------------------------------------------------------------------------- rotations


def rolled(graph: fx.Graph) -> int:
    """``cat(-x[half:], x[:half]) * s`` -> ``roll(x, half) * s'``, s' = s with -s[:half].

    ``(-x) * s`` and ``x * (-s)`` are the same number; s' is made once for all layers that use s.
    Done where x is two halves wide for certain, and s is as wide (its last dimension was put
    together from parts, so it is not a one that is broadcast).
    """
    count = 0
    signed: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(graph.nodes):
        if not _is(node, aten.mul.Tensor) or len(node.args) != 2:
            continue
        for turned, factor in (node.args, node.args[::-1]):
            found = _rotation(turned)
            if found is None or not _wide(factor):
                continue
            if (factor, found[1]) not in signed:
                signed[factor, found[1]] = _negated_half(graph, factor, found[1])
            with graph.inserting_before(node):
                roll = graph.call_function(aten.roll.default, (found[0], [found[1]], [-1]))
            roll.meta.update(turned.meta)
            node.args = (roll, signed[factor, found[1]])
            count += 1
            break
    return count


def _rotation(node: Any) -> tuple[fx.Node, int] | None:
    """x and half, where ``node`` is ``cat([-x[..., half:], x[..., :half]], -1)``."""
    if not _is(node, aten.cat.default) or node.args[1:] != (-1,) or len(node.args[0]) != 2:
        return None
    negative, first = node.args[0]
    if not _is(negative, aten.neg.default) or not _is(first, aten.slice.Tensor):
        return None
    second = negative.args[0]
    if not _is(second, aten.slice.Tensor) or first.args[0] is not second.args[0]:
        return None
    if len(first.args) != 4 or len(second.args) != 4:
        return None
    x, axis, start, half = first.args
    width = _width(x)
    end = second.args[3]
    halves = start == 0 and isinstance(half, int) and second.args[2] == half
    if not halves or width is None or width != 2 * half:
        return None
    if not isinstance(end, int) or end < width:
        return None
    return (x, half) if axis in (-1, 3) and second.args[1] == axis else None


def _width(node: fx.Node) -> int | None:
    """Size of the last of four dimensions, where the graph says it in numbers."""
    while _is(node, aten.transpose.int) and node.args[1:] == (1, 2):
        node = node.args[0]  # type: ignore[assignment]
    if _is(node, aten.reshape.default) and len(node.args[1]) == 4:  # type: ignore[arg-type]
        last = node.args[1][3]  # type: ignore[index]
        return last if isinstance(last, int) and last > 0 else None
    shape = tuple(getattr(node.meta.get("val"), "shape", ()))
    return shape[3] if len(shape) == 4 and isinstance(shape[3], int) else None


_SAME_WIDTH = {aten.sin.default, aten.cos.default, aten.to.dtype, aten.mul.Tensor}


def _wide(node: Any) -> bool:
    """The last dimension is a concatenation, so it is no one that is broadcast."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is aten.cat.default:
            return bool(node.args[1:] == (-1,) and len(node.args[0]) > 1)  # type: ignore[arg-type]
        if node.target is aten.unsqueeze.default:
            if node.args[1] not in (1, 2):
                return False
        elif node.target not in _SAME_WIDTH or len(node.all_input_nodes) != 1:
            return False
        node = node.args[0]
    return False


def _negated_half(graph: fx.Graph, factor: fx.Node, half: int) -> fx.Node:
    with graph.inserting_after(factor):
        first = graph.call_function(aten.slice.Tensor, (factor, -1, 0, half))
    with graph.inserting_after(first):
        second = graph.call_function(aten.slice.Tensor, (factor, -1, half, sys.maxsize))
    with graph.inserting_after(second):
        negative = graph.call_function(aten.neg.default, (first,))
    with graph.inserting_after(negative):
        return graph.call_function(aten.cat.default, ([negative, second], -1))


# ---------------------------------------------------------------------------- equal operations


def merged(graph: fx.Graph) -> int:
    """Operations with equal arguments run once (what every layer unsqueezes, say)."""
    count = 0
    known: dict[Any, fx.Node] = {}
    kept = set(graph.output_node().all_input_nodes)  # a caller may write into what it was given
    for node in list(graph.nodes):
        if node.op != "call_function" or node in kept or not _pure(node.target):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            count += 1
    return count


def _pure(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags
    return getattr(target, "__module__", "") == "_operator"


def _frozen(value: Any) -> Any:
    """``value`` as a key; numbers that are equal but of another type (1, 1.0, True) differ."""
    if isinstance(value, list | tuple):
        return (type(value), *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step)))
    return (type(value), repr(value) if isinstance(value, float) else value)


# ---------------------------------------------------------------------------- one token


def flattened(graph: fx.Graph) -> int:
    """Moves of a dimension of size one, which leave every element in its place, become reshapes.

    A query of one token is (B, 1, H, d) and (B, H, 1, d) in the same order.
    """
    count = 0
    for node in list(graph.nodes):
        if _is(node, aten.transpose.int) and set(node.args[1:]) == {1, 2}:
            source = node.args[0]
            if _is(source, aten.reshape.default) and len(source.args[1]) == 4:
                a, b, c, d = source.args[1]
                if b == 1 or c == 1:
                    node.target, node.args = aten.reshape.default, (source.args[0], [a, c, b, d])
                    count += 1
    for node in list(graph.nodes):
        while _is(node, aten.reshape.default) and _is(node.args[0], aten.reshape.default):
            node.args = (node.args[0].args[0], node.args[1])
            count += 1
    return count
