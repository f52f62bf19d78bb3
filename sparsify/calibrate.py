"""Stream calibration data once through the graph and keep a bounded sample of what passes ask for.

Every region asked about keeps a reservoir (Vitter 1985, algorithm R) of token rows per port; all
ports of a region keep the same tokens. The run stops at the last node asked for, so the
language-model head is never computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.regions import Region
from sparsify.sensitivity import Sensitivity

Progress = Callable[[str, int, int], None]
SLOPE = ".slope"  # a port's suffix: not rows of tokens, but what Sensitivity says of its features


@dataclasses.dataclass
class _Reservoir:
    """A uniform sample of at most ``size`` rows of a stream, the same rows for all ports."""

    size: int
    generator: torch.Generator
    seen: int = 0
    rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def plan(self, count: int) -> tuple[Tensor, Tensor]:
        """(which of the next ``count`` rows to keep, which slots they take)."""
        position = torch.arange(self.seen, self.seen + count)
        draw = torch.rand(count, generator=self.generator, dtype=torch.float64)
        slot = torch.where(position < self.size, position, (draw * (position + 1)).long())
        keep = (slot < self.size).nonzero().flatten()
        self.seen += count
        return keep, slot[keep]

    def put(self, port: str, rows: Tensor, keep: Tensor, slot: Tensor) -> None:
        if port not in self.rows:
            self.rows[port] = rows.new_zeros((self.size, rows.shape[-1]))
        self.rows[port][slot] = rows[keep]


class _Tap(fx.Interpreter):
    """Runs the graph up to the last tapped node and hands tapped values out."""

    def __init__(self, gm: fx.GraphModule, taps: Mapping[fx.Node, Any], last: fx.Node) -> None:
        super().__init__(gm)
        self.taps = taps
        self.last = last
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.taps:
            self.values[n] = value
        if n is self.last:
            raise _Done
        return value


class _Done(Exception):
    """The last tapped node has run."""


def run_until(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    last: fx.Node,
    taps: Mapping[fx.Node, Any] | None = None,
) -> dict[fx.Node, Tensor]:
    """Run the graph on flat inputs up to ``last``; the values of the nodes in ``taps``."""
    runner = _Tap(gm, taps or {}, last)
    with torch.no_grad(), contextlib.suppress(_Done):
        runner.run(*inputs)
    return runner.values


def collect(
    gm: fx.GraphModule,
    wants: Sequence[tuple[Region, Mapping[str, int]]],
    batches: Iterable[tuple[Sequence[Tensor], Tensor | None]],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    total: int = 0,
    predicts: bool = False,
) -> int:
    """Fill ``region.samples`` for every region in ``wants``.

    Args:
        gm: the captured graph.
        wants: (region, port -> tokens); the largest number asked of a region counts for all its
        ports.
        batches: flat graph inputs, and a mask (batch, token) of the tokens that count, or None.
        seed: of the reservoir.
        progress: called with ("calibrate", batches done, total).
        total: how many batches will come, for the progress display.
        predicts: the graph's first result is logits of tokens.

    Returns:
        Tokens seen.
    """
    if not wants:
        return 0
    taps: dict[fx.Node, list[tuple[Region, str]]] = {}
    pools: dict[int, _Reservoir] = {}
    for region, ports in wants:
        pools[id(region)] = _Reservoir(max(ports.values()), torch.Generator().manual_seed(seed))
        for port in ports:
            if port.endswith(SLOPE):
                continue
            taps.setdefault(region.ports[port.removesuffix(".energy")], []).append((region, port))
    asked = [region for region, ports in wants if any(port.endswith(SLOPE) for port in ports)]
    slopes = Sensitivity(gm, asked, seed) if asked and predicts else None
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    last = max(taps, key=lambda n: order[n])
    tokens = 0
    for done, (inputs, mask) in enumerate(batches):
        values = run_until(gm, inputs, last, taps)
        if slopes is not None:
            slopes.add(inputs, mask)
        plans: dict[int, tuple[Tensor, Tensor]] = {}
        for node, users in taps.items():
            rows = _rows(values[node], mask)
            for region, port in users:
                pool = pools[id(region)]
                if id(region) not in plans:
                    plans[id(region)] = pool.plan(rows.shape[0])
                energy = port.endswith(".energy")
                kept = rows.float().square().sum(-1, keepdim=True) if energy else rows
                pool.put(port, kept, *plans[id(region)])
        tokens += int(mask.sum()) if mask is not None else int(rows.shape[0])
        if progress is not None:
            progress("calibrate", done + 1, max(total, done + 1))
    for region, _ in wants:
        pool = pools[id(region)]
        filled = min(pool.seen, pool.size)
        region.samples = {port: rows[:filled] for port, rows in pool.rows.items()}
        moved = None if slopes is None else slopes.of(region)
        if moved is not None:
            region.samples[f"x{SLOPE}"] = moved
    return tokens


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, features); padded tokens left out where the value has a token dimension."""
    if mask is not None and value.shape[: mask.dim()] == mask.shape:
        return value[mask.bool()]
    return value.reshape(-1, value.shape[-1])
