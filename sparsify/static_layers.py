"""The honest baseline of depth routing: the same share of layers dropped for every token.

Layers are ranked on calibration text in the two ways that training-free layer dropping uses: those
whose result is most like what they get (block influence ``1 - cos(x, y)``; ShortGPT, Men et al.,
arXiv:2403.03853), or the run of neighbours across which the stream turns least (Gromov et al.,
arXiv:2403.17887). What dropped layers add on average may go into a bias; neither paper does that,
and it helps the baseline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.runtime.depth import RoutedLayer
from sparsify.static_pruning import all_live
from sparsify.static_units import running


@dataclasses.dataclass(frozen=True)
class LayerRanking:
    """What layers do to the stream on calibration text.

    Attributes:
        paths: the layers, in order.
        turn: (L, L) mean ``1 - cos(stream before layer i, stream after layer j)``.
        change: (L, D) mean of what each layer adds.
    """

    paths: tuple[str, ...]
    turn: Tensor
    change: Tensor

    def by_influence(self, count: int) -> list[int]:
        """The ``count`` layers that change the stream's direction least."""
        return sorted(self.turn.diagonal().argsort(stable=True)[:count].tolist())

    def neighbours(self, count: int) -> list[int]:
        """The ``count`` neighbouring layers across which the direction changes least."""
        starts = range(len(self.paths) - count + 1)
        best = min(starts, key=lambda at: float(self.turn[at, at + count - 1]))
        return list(range(best, best + count))


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Which layers are dropped: path -> (D,) what stands in for the layer, or None."""

    dropped: Mapping[str, Tensor | None]
    layers: int
    note: str

    @property
    def active(self) -> float:
        """Fraction of layers that stay."""
        return 1 - len(self.dropped) / self.layers

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the routed model is its dense model without these layers."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(all_live(model))
            for path, bias in self.dropped.items():
                stack.enter_context(_without(model.get_submodule(path), bias))
            yield


def _without(module: Any, bias: Tensor | None) -> contextlib.AbstractContextManager[None]:
    usual = module.forward

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        before, module.dropped = module.dropped, None if bias is None else nn.Parameter(bias)
        try:
            with running(module, lambda _, select, *inputs: usual(select * 0, *inputs)):
                yield
        finally:
            module.dropped = before

    return changed()


def layers_of(model: nn.Module) -> dict[str, RoutedLayer]:
    """Path -> routed layer, in model order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, RoutedLayer)}


def rank_layers(
    model: nn.Module, run: Callable[[Tensor], Any], batches: Iterable[Tensor]
) -> LayerRanking:
    """Rank the routed layers of a model on its dense activations.

    Args:
        run: calls the model on token ids; batches: token ids (batch, token).
    """
    found = layers_of(model)
    streams: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], result: Any) -> None:
            y = result if isinstance(result, Tensor) else result[0]
            streams[path] = inputs[1].flatten(0, 1).float(), y.flatten(0, 1).float()

        return hook

    turn = torch.zeros(len(found), len(found), dtype=torch.float64)
    change: dict[str, Tensor] = {}
    seen = 0
    with contextlib.ExitStack() as stack, torch.no_grad(), all_live(model):
        for path, layer in found.items():
            stack.callback(layer.register_forward_hook(keep(path)).remove)
        for ids in batches:
            streams.clear()
            run(ids)
            ends = [streams[path] for path in found]
            units = [
                (nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1))
                for x, y in ends
            ]
            for i, j in itertools.combinations_with_replacement(range(len(found)), 2):
                turn[i, j] += float((1 - (units[i][0] * units[j][1]).sum(-1)).sum())
            for path, (x, y) in zip(found, ends, strict=True):
                change[path] = change.get(path, 0) + (y - x).double().sum(0)
            seen += len(ends[0][0])
    changes = torch.stack([change[path] for path in found]) / seen
    return LayerRanking(tuple(found), turn / seen, changes.float())


def layer_plans(ranking: LayerRanking, active: float) -> list[LayerPlan]:
    """The ways to drop layers so that at least the fraction ``active`` of them stays."""
    total = len(ranking.paths)
    count = math.floor((1 - active) * total + 1e-6)
    if not count:
        return []
    ways = {
        "layers that turn the stream least": ranking.by_influence(count),
        "neighbouring layers that turn it least": ranking.neighbours(count),
    }
    found = []
    for name, chosen in ways.items():
        paths = [ranking.paths[at] for at in chosen]
        biases = dict(zip(paths, ranking.change[chosen], strict=True))
        found.append(LayerPlan(biases, total, f"{name}, mean added back"))
        found.append(LayerPlan(dict.fromkeys(paths), total, name))
    return found
