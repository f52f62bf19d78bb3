"""Find regions by their roles in the graph, with the reason for every near miss.

No architecture and no parameter name is known here. ``find`` returns the feed-forward and attention
regions in execution order, near misses with the role that failed, and the runs of repeated blocks.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify.blocks import find_blocks
from sparsify.condition import condition_of
from sparsify.layers import find_stacks
from sparsify.linears import find_linears
from sparsify.match_attention import match_attention
from sparsify.match_ffn import match_feed_forward
from sparsify.modality import modality_ports, token_inputs
from sparsify.probe import annotate
from sparsify.regions import Matches, NearMiss, Region


def find(gm: fx.GraphModule, example: tuple[Any, ...]) -> Matches:
    """All regions of a captured graph.

    Args:
        gm: a captured graph (flat inputs).
        example: its example inputs; run once to learn concrete shapes.
    """
    annotate(gm, example)
    linears = find_linears(gm)
    regions: list[Region] = []
    misses: list[NearMiss] = []
    for node in gm.graph.nodes:
        found: Region | NearMiss | None
        found = match_attention(gm, node, linears) if node.op == "call_function" else None
        if found is None and node in linears:
            found = match_feed_forward(gm, linears[node], linears)
        if isinstance(found, NearMiss):
            misses.append(found)
        elif found is not None:
            regions.append(found)
    regions.sort(key=lambda region: int(region.ports["y"].meta["order"]))
    for region in regions:
        condition = condition_of(region.ports["x"], linears)
        if condition is not None:
            region.ports["condition"] = condition
    taken: set[fx.Node] = set()
    for region in regions:  # a projection that two regions read belongs to the first
        region.parts = [part for part in region.parts if part.ports["y"] not in taken]
        taken.update(part.ports["y"] for part in region.parts)
    matches = Matches(regions, misses, [])
    given = token_inputs(gm)
    for region in matches.all_regions:
        region.ports |= modality_ports(region.ports["x"], *given)
    matches.blocks = find_blocks(regions)
    matches.stacks, beside = find_stacks(gm, matches.blocks, regions)
    misses += beside
    _number(matches.all_regions)
    for region in regions:
        for part in region.parts:
            part.parent, part.block, part.within = region.path, region.block, region
    _tell_peers(matches)
    return matches


def _tell_peers(matches: Matches) -> None:
    """Tell every projection which ones have its place in the other blocks of the run."""
    start = 0
    while start < len(matches.blocks):
        members = range(start, start + matches.blocks[start].count)
        parts = [[p for r in matches.regions if r.block == at for p in r.parts] for at in members]
        if len({tuple(p.role for p in block) for block in parts}) == 1:
            for peers in zip(*parts, strict=True):
                for part in peers:
                    part.peers = peers
        start = members.stop


def _number(regions: list[Region]) -> None:
    """Unique paths per kind, and positions."""
    by_kind: dict[str, list[Region]] = {}
    for region in regions:
        by_kind.setdefault(region.kind, []).append(region)
    for same in by_kind.values():
        seen: dict[str, int] = {}
        for index, region in enumerate(same):
            region.index, region.count = index, len(same)
            times = seen[region.path] = seen.get(region.path, 0) + 1
            if times > 1:  # one module called several times (ALBERT), or two layers inline
                region.path = f"{region.path}#{times}"
