"""Layers and stacks: blocks as slices of the graph between two values of the residual stream.

A cut is a value through which everything that an earlier block computed reaches the later ones
(its own results beside the stream, such as the key/value cache, go to the outputs only). Cuts are
found by that property alone, so pre-norm, post-norm and parallel blocks, with or without a cache,
look alike. Blocks of a run must have equal labelled graphs between their cuts.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import fx

from sparsify.blocks import above, below, fingerprint, prefix
from sparsify.probe import op_base, shape_of
from sparsify.regions import Block, Layer, NearMiss, Region, Site, Stack


def find_stacks(
    gm: fx.GraphModule, blocks: Sequence[Block], regions: Sequence[Region]
) -> tuple[list[Stack], list[NearMiss]]:
    """The stack of every run of blocks, or why it is none."""
    stacks: list[Stack] = []
    misses: list[NearMiss] = []
    start = 0
    while start < len(blocks):
        run = blocks[start : start + blocks[start].count]
        groups = [
            tuple(r for r in regions if r.block == start + index) for index in range(len(run))
        ]
        path = prefix([block.path for block in run]) or "stack"
        try:
            stacks.append(_stack(gm, path, start, run, groups))
        except NoStack as reason:
            where = groups[0][0].where
            misses.append(NearMiss("Layer", path, "stream", str(reason), where))
        start += len(run)
    return stacks, misses


class NoStack(Exception):
    """Why a run of blocks is no stack."""


def _stack(
    gm: fx.GraphModule,
    path: str,
    first: int,
    run: Sequence[Block],
    groups: Sequence[tuple[Region, ...]],
) -> Stack:
    shape = shape_of(groups[0][-1].ports["y"])
    if len(shape) != 3:
        raise NoStack(f"the stream is {shape}, not (batch, token, feature)")
    cuts: list[fx.Node] = []
    for group in groups:
        cuts.append(_cut_before(group[0].ports["x"], shape, cuts[-1] if cuts else None))
    prints = [fingerprint(between(a, b)) for a, b in itertools.pairwise(cuts)]
    cuts.append(_last_cut(cuts, groups[-1][-1].ports["y"], shape, prints[0]))
    if any(found != prints[0] for found in prints):
        raise NoStack("the blocks between the values of the stream differ")
    layers = []
    for index, (block, group) in enumerate(zip(run, groups, strict=True)):
        x, y = cuts[index], cuts[index + 1]
        leaves = slots_of(between(x, y), y)
        layers.append(
            Layer(
                block.path or f"layer.{index}",
                group[0].where,
                ports={"x": x, "y": y},
                sites={"layer": Site(y, (y,), leaves)},
                block=first + index,
                gm=gm,
                inside=group,
                width=shape[2],
            )
        )
    ports = {"x": cuts[0], "y": cuts[-1]} | {f"x.{i}": c for i, c in enumerate(cuts[:-1]) if i}
    sites = {f"layer.{i}": layer.sites["layer"] for i, layer in enumerate(layers)}
    sites = {k: Site(s.result, s.nodes, s.extra) for k, s in sites.items()}
    return Stack(
        path, groups[0][0].where, ports=ports, sites=sites, block=first, layers=tuple(layers)
    )


def between(x: fx.Node, y: fx.Node, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """What is computed from ``x`` for ``y``, with the weights it reads; ``y`` but not ``x``.

    ``stop``: values that are given, with what is computed for them only.
    """
    inside = (below(x) & above(y, stop)) - {x}
    return inside | {a for n in inside for a in n.all_input_nodes if a.op == "get_attr"}


def slots_of(inside: Iterable[fx.Node], y: fx.Node) -> tuple[fx.Node, ...]:
    """The cache entries that a block makes: what is read outside beside the stream.

    Raises:
        NoStack: something else leaves the block.
    """
    body = set(inside)
    found = []
    for node in sorted(body - {y}, key=lambda n: int(n.meta.get("order", 0))):
        users = [u for u in node.users if u not in body]
        if node.op == "get_attr" or not users:
            continue
        parts: Any = node.args[0] if op_base(node) == "cat" else None
        grows = isinstance(parts, list | tuple) and len(parts) == 2
        if not grows or parts[0] in body or parts[1] not in body:
            raise NoStack(f"{node.name} leaves the block beside the stream and is no cache entry")
        if any(int(u.meta.get("order", 0)) < int(y.meta.get("order", 0)) for u in users):
            raise NoStack(f"the cache entry {node.name} is read before the block ends")
        found.append(node)
    return tuple(found)


def _cut_before(x: fx.Node, shape: tuple[int, ...], before: fx.Node | None) -> fx.Node:
    """The last value of the stream at or before a block's first region."""
    passed = below(before) if before is not None else None
    candidates = [n for n in above(x) if shape_of(n) == shape and n.op != "get_attr"]
    for cut in sorted(candidates, key=lambda n: int(n.meta["order"]), reverse=True):
        after = below(cut)
        beside = above(cut) if passed is None else passed

        def around(node: fx.Node, after: set[fx.Node] = after, cut: fx.Node = cut) -> bool:
            """A value of an earlier block that is read after the cut."""
            if node in after or node is cut or node not in beside:  # noqa: B023
                return False
            return passed is not None or shape_of(node) == shape

        readers = (n for n in after if n is not cut and n.op != "output")
        if not any(around(a) for n in readers for a in n.all_input_nodes):
            return cut
    raise NoStack(f"no single value carries the stream to {x.name}")


def _last_cut(cuts: Sequence[fx.Node], y: fx.Node, shape: tuple[int, ...], wanted: str) -> fx.Node:
    """Where the last block ends: as far after its last region as the others do."""
    after = below(y)
    if len(cuts) < 2:
        raise NoStack("a single block")
    for node in sorted(after, key=lambda n: int(n.meta["order"])):
        if node.target != cuts[-1].target or shape_of(node) != shape:
            continue
        if fingerprint(between(cuts[-1], node)) == wanted:
            return node
    raise NoStack("the last block does not end as the others do")
