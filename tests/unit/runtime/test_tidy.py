"""Cleanups of graphs that run: what they rewrite, what they leave, and that no bit changes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.runtime.straight_text import function
from sparsify.runtime.tidy import flattened, merged, prune, rolled, shared_keys, tidy

aten = torch.ops.aten


def inputs(graph: fx.Graph, *names: str) -> list[fx.Node]:
    return [graph.placeholder(name) for name in names]


def targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def run(graph: fx.Graph, *tensors: Tensor) -> tuple[Tensor, ...]:
    return function(graph, nn.Module())(*tensors)


def grouped(times: int = 3, unsqueezed: int = 2, heads: int = 6) -> fx.Graph:
    graph = fx.Graph()
    q, k, v, mask = inputs(graph, "q", "k", "v", "mask")

    def repeated(x: fx.Node) -> fx.Node:
        more = graph.call_function(aten.unsqueeze.default, (x, unsqueezed))
        wide = graph.call_function(aten.expand.default, (more, [2, 2, times, 5, 8]))
        return graph.call_function(aten.reshape.default, (wide, [2, heads, 5, 8]))

    arguments = (q, repeated(k), repeated(v), mask)
    graph.output((graph.call_function(aten.scaled_dot_product_attention.default, arguments),))
    return graph


@pytest.mark.parametrize("queries", [1, 4])
def test_keys_and_values_are_read_unrepeated(queries: int) -> None:
    torch.manual_seed(0)
    graph = grouped()
    q, k, v = torch.randn(2, 6, queries, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, queries, 5) > 0.3
    (before,) = run(graph, q, k, v, mask)
    assert shared_keys(graph) == 1
    prune(graph)
    assert targets(graph) == ["aten.scaled_dot_product_attention.default"]
    (after,) = run(graph, q, k, v, mask)
    assert torch.equal(before, after)
    assert shared_keys(graph) == 0


def test_other_repetitions_stay() -> None:
    assert shared_keys(grouped(unsqueezed=1)) == 0  # all heads, again and again: another order
    assert shared_keys(grouped(times=1, heads=2)) == 0


def rotary(width: int = 8, half: int = 4, made: bool = True) -> fx.Graph:
    graph = fx.Graph()
    x, angles = inputs(graph, "x", "angles")
    heads = graph.call_function(aten.reshape.default, (x, [2, 3, -1, width]))
    q = graph.call_function(aten.transpose.int, (heads, 1, 2))
    wide = graph.call_function(aten.cat.default, ([angles, angles], -1)) if made else angles
    sine = graph.call_function(aten.sin.default, (wide,))
    first = graph.call_function(aten.slice.Tensor, (q, 3, 0, half))
    second = graph.call_function(aten.slice.Tensor, (q, 3, half, sys.maxsize))
    turned = graph.call_function(
        aten.cat.default, ([graph.call_function(aten.neg.default, (second,)), first], -1)
    )
    graph.output((graph.call_function(aten.mul.Tensor, (turned, sine)),))
    return graph


def test_halves_are_rotated_in_one_operation() -> None:
    torch.manual_seed(0)
    graph = rotary()
    x, angles = torch.randn(2, 3, 32), torch.randn(3, 4)
    x[0, 0, 0], x[0, 0, 5], x[1, 1, 1] = 0.0, -0.0, float("inf")
    (before,) = run(graph, x, angles)
    assert rolled(graph) == 1
    prune(graph)
    assert "aten.roll.default" in targets(graph)
    (after,) = run(graph, x, angles)
    assert torch.equal(before, after)
    assert torch.equal(before.signbit(), after.signbit())


def test_what_is_no_rotation_by_half_stays() -> None:
    assert rolled(rotary(width=12)) == 0  # a third
    assert rolled(rotary(made=False)) == 0  # the sine may be one number for all


def test_equal_operations_run_once_and_random_ones_do_not() -> None:
    graph = fx.Graph()
    (x,) = inputs(graph, "x")
    views = [graph.call_function(aten.unsqueeze.default, (x, 1)) for _ in range(3)]
    noise = [graph.call_function(aten.rand_like.default, (x,)) for _ in range(2)]
    scaled = [graph.call_function(aten.mul.Tensor, (view, 1)) for view in views]
    scaled.append(graph.call_function(aten.mul.Tensor, (views[0], 1.0)))  # float, not integer
    given = [graph.call_function(aten.neg.default, (x,)) for _ in range(2)]
    both = graph.call_function(aten.cat.default, ([*scaled, *map(_row(graph), noise)],))
    graph.output((both, *given))
    assert merged(graph) == 4
    graph.lint()
    assert targets(graph).count("aten.mul.Tensor") == 2
    assert targets(graph).count("aten.rand_like.default") == 2
    assert targets(graph).count("aten.neg.default") == 2  # results that a caller may write into


def _row(graph: fx.Graph):  # type: ignore[no-untyped-def]
    return lambda node: graph.call_function(aten.unsqueeze.default, (node, 1))


def test_views_of_one_token_are_one_reshape() -> None:
    graph = fx.Graph()
    (x,) = inputs(graph, "x")
    heads = graph.call_function(aten.reshape.default, (x, [2, 1, -1, 4]))
    q = graph.call_function(aten.transpose.int, (heads, 1, 2))
    back = graph.call_function(aten.transpose.int, (q, 1, 2))
    flat = graph.call_function(aten.reshape.default, (back, [2, 1, -1]))
    graph.output((q, flat))
    x = torch.randn(2, 1, 12)
    before = run(graph, x)
    assert flattened(graph) > 0
    prune(graph)
    assert targets(graph) == ["aten.reshape.default", "aten.reshape.default"]
    for a, b in zip(before, run(graph, x), strict=True):
        assert torch.equal(a, b)


def test_several_tokens_keep_their_transposes() -> None:
    graph = fx.Graph()
    (x,) = inputs(graph, "x")
    heads = graph.call_function(aten.reshape.default, (x, [2, -1, 3, 4]))
    graph.output((graph.call_function(aten.transpose.int, (heads, 1, 2)),))
    assert flattened(graph) == 0


def test_a_graph_that_writes_in_place_is_left_alone() -> None:
    graph = fx.Graph()
    (x,) = inputs(graph, "x")
    copies = [graph.call_function(aten.clone.default, (x,)) for _ in range(2)]
    graph.call_function(aten.add_.Tensor, (copies[0], 1))
    graph.output((copies[0], copies[1]))
    assert tidy(graph) == {}
    a, b = run(graph, torch.zeros(2))
    assert not torch.equal(a, b)
