"""Repeated blocks: runs of isomorphic slices of the residual stream.

A block ends at the addition that takes the last of a period of regions into the stream. Its nodes
are those between two such ends; blocks are the same if their labelled graphs have the same
Weisfeiler-Lehman fingerprint (networkx), labels being operation and shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import networkx as nx
from torch import fx

from sparsify.probe import op_base, shape_of
from sparsify.regions import Block, Region


def find_blocks(regions: list[Region]) -> list[Block]:
    """The longest runs of repeated blocks; sets ``region.block`` on their regions."""
    blocks: list[Block] = []
    start = 0
    while start < len(regions):
        period, count = _longest_run([_signature(r) for r in regions[start:]])
        if count < 2:
            start += 1
            continue
        run = _isomorphic(regions[start : start + period * count], period)
        for region_list, (path, index, total, fingerprint) in run:
            for region in region_list:
                region.block = len(blocks)
            names = tuple(r.path for r in region_list)
            blocks.append(Block(path, index, total, names, fingerprint))
        start += max(period * len(run), 1)
    return blocks


def _signature(region: Region) -> tuple[Any, ...]:
    return (region.kind, *sorted((k, str(v)) for k, v in region.facts().items()))


def _longest_run(signs: list[tuple[Any, ...]]) -> tuple[int, int]:
    """(period, count) of the repetition at the start that covers most regions."""
    best = (1, 1)
    for period in range(1, len(signs) // 2 + 1):
        count = 1
        while signs[:period] == signs[period * count : period * (count + 1)]:
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best


def _ends(region: Region) -> fx.Node:
    """The addition that takes the region's result into the stream, else its result."""
    node = region.ports["y"]
    for _ in range(12):
        if len(node.users) != 1:
            break
        (node,) = node.users
        if op_base(node) in ("add", "add_"):
            return node
    return region.ports["y"]


def _isomorphic(
    regions: list[Region], period: int
) -> list[tuple[list[Region], tuple[str, int, int, str]]]:
    """The run's blocks with their fingerprints; a block unlike the one before ends the run."""
    groups = [regions[at : at + period] for at in range(0, len(regions), period)]
    prints: list[str] = []
    before: set[fx.Node] = set()
    for group in groups:
        end = above(_ends(group[-1]))
        # below the first region's input: what is computed once for all blocks (masks, rotations)
        # belongs to none of them
        first = group[0].ports["x"]
        inside = (end - before) & (below(first) - {first})
        inside |= {a for n in inside for a in n.all_input_nodes if a.op == "get_attr"}
        prints.append(fingerprint(inside))
        before |= end
    total = 1
    while total < len(prints) and prints[total] == prints[0]:
        total += 1
    if total < 2:
        return []
    return [
        (group, (prefix([r.path for r in group]), index, total, prints[index]))
        for index, group in enumerate(groups[:total])
    ]


def below(node: fx.Node) -> set[fx.Node]:
    """``node`` and all that is computed from it."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        walk = stack.pop()
        if walk not in seen:
            seen.add(walk)
            stack.extend(walk.users)
    return seen


def above(node: fx.Node, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """``node`` and all that it is computed from, up to ``stop`` (left out)."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        walk = stack.pop()
        if walk not in seen and walk not in stop:
            seen.add(walk)
            stack.extend(walk.all_input_nodes)
    return seen


def fingerprint(nodes: set[fx.Node]) -> str:
    """Equal for isomorphic labelled graphs."""
    graph = nx.DiGraph()
    for node in nodes:
        name = op_base(node) if node.op == "call_function" else ""
        graph.add_node(node.name, label=f"{node.op}:{name}:{shape_of(node)}")
    for node in nodes:
        graph.add_edges_from((a.name, node.name) for a in node.all_input_nodes if a in nodes)
    with warnings.catch_warnings():  # that hashes changed in networkx 3.5; ours are never stored
        warnings.simplefilter("ignore", UserWarning)
        return str(nx.weisfeiler_lehman_graph_hash(graph, node_attr="label", iterations=3))


def prefix(paths: Sequence[str]) -> str:
    """The dotted path that all share; ``#2`` of repeated ones does not count."""
    parts = [path.split("#")[0].split(".") for path in paths]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
