"""The honest baseline: the same units dropped for every token, at the budget of a routed model.

Neurons and heads are ranked by what they add to the output on calibration text, as strong
training-free structured pruning does: by energy ``E[h^2] * |w_down|^2``, or, where the mean of what
is dropped goes into a bias, by what that leaves, ``Var[h] * |w_down|^2`` (An et al., FLAP,
arXiv:2312.11983). Optionally the columns that stay are refitted by least squares to the dense
output (as in SparseGPT, arXiv:2301.00774), which changes weights, so there is no dense limit any
more. Budgets are one for all layers, or those that the routed model really spent per layer. Nothing
is copied and nothing stays changed: the pruned model exists inside a ``with`` block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.regions import FeedForward
from sparsify.runtime.dial import kept
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns
from sparsify.runtime.program import Program

linear = nn.functional.linear


REFIT_RIDGE = 0.01  # relative to the mean variance of the neurons that stay
REFIT_BYTES = 2**31  # of second moments; layers too large for it are not refitted


@dataclasses.dataclass(frozen=True)
class DenseFFN:
    """A feed-forward layer with one neuron per row: up, gate, down (F, D), biases (F,), (D,)."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None
    activation: Program

    @classmethod
    def of_region(cls, region: FeedForward) -> DenseFFN:
        """Views of a region's weights."""
        gate = region.gate
        return cls(
            region.up.weight, gate.weight if gate else None, region.down.weight.t(),
            region.up.bias, gate.bias if gate else None, region.down.bias, region.activation,
        )  # fmt: skip

    @classmethod
    def of_routed(cls, module: RoutedFFN) -> DenseFFN:
        """Views of a routed layer's weights; neurons in its packed order."""

        def flat(packed: Tensor | None) -> Tensor | None:
            return None if packed is None else packed.flatten(0, 1)

        return cls(
            module.up.flatten(0, 1), flat(module.gate), module.down.flatten(0, 1),
            flat(module.up_bias), flat(module.gate_bias), module.down_bias, module.activation,
        )  # fmt: skip

    def hidden(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., F)."""
        sums = [linear(x, self.up, self.up_bias)]
        if self.gate is not None:
            sums.append(linear(x, self.gate, self.gate_bias))
        return self.activation(*sums)

    def output(self, hidden: Tensor, extra: Tensor | None = None) -> Tensor:
        """hidden (..., F) -> (..., D), plus ``extra`` (D,)."""
        y = hidden @ self.down
        for bias in (self.down_bias, extra):
            y = y if bias is None else y + bias
        return y


@dataclasses.dataclass
class Moments:
    """Running mean and second moment of rows; with ``cross``, of all pairs of features too."""

    count: int = 0
    first: Tensor | None = None
    second: Tensor | None = None
    cross: Tensor | None = None

    def add(self, rows: Tensor, second: Tensor | None = None) -> None:
        """rows (n, ...); ``second`` is the sum of second moments where it is not rows squared."""
        wide = rows.detach().double()
        one, two = wide.sum(0), wide.square().sum(0) if second is None else second.double()
        self.first = one if self.first is None else self.first + one
        self.second = two if self.second is None else self.second + two
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        assert self.first is not None
        return self.first / self.count

    @property
    def energy(self) -> Tensor:
        assert self.second is not None
        return self.second / self.count


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What each unit of one layer is worth.

    Attributes:
        energy: (N,) mean squared size of the unit's part of the output.
        variance: (N,) the same around the unit's mean.
        mean: dead units (N,) bool -> the mean of their parts together (D,).
        refit: live neurons (N,) bool -> (down (N, D), bias (D,)) that give the dense output back
            as well as the live ones can; None where that was not measured.
    """

    energy: Tensor
    variance: Tensor
    mean: Callable[[Tensor], Tensor]
    refit: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def units(self) -> int:
        return len(self.energy)

    def choose(self, count: int, *, compensate: bool) -> tuple[Tensor, Tensor | None]:
        """(live units (N,) bool, what to add to the output (D,) or None)."""
        score = self.variance if compensate else self.energy
        live = torch.zeros(self.units, dtype=torch.bool)
        live[score.argsort(descending=True, stable=True)[:count]] = True
        return live, self.mean(~live) if compensate else None


def rank_neurons(ffn: DenseFFN, moments: Moments) -> Ranking:
    """From the moments of ``hidden`` (F,)."""
    down = ffn.down.detach().double()
    size = down.square().sum(1)
    mean = moments.mean

    def dropped(dead: Tensor) -> Tensor:
        return ((mean * dead) @ down).to(ffn.down.dtype)

    def refit(live: Tensor) -> tuple[Tensor, Tensor]:
        assert moments.cross is not None
        covariance = moments.cross.double() / moments.count - torch.outer(mean, mean)
        kept = covariance[live][:, live]
        kept.diagonal().add_(REFIT_RIDGE * kept.diagonal().mean())
        found = torch.zeros_like(down)
        found[live] = torch.linalg.solve(kept, covariance[live] @ down)
        return found.to(ffn.down.dtype), (mean @ (down - found)).to(ffn.down.dtype)

    variance = (moments.energy - mean.square()).clamp_min(0)
    crossed = refit if moments.cross is not None else None
    return Ranking(moments.energy * size, variance * size, dropped, crossed)


def rank_heads(module: RoutedColumns, moments: Moments) -> Ranking:
    """From the mean (H, c) and second moment (H, c, c) of every head's packed context."""
    blocks = module.blocks.detach().double()  # (H, c, out)
    gram = blocks @ blocks.transpose(1, 2)
    mean = moments.mean
    outer = mean.unsqueeze(2) * mean.unsqueeze(1)

    def dropped(dead: Tensor) -> Tensor:
        parts = torch.einsum("hc,hco->ho", mean, blocks)
        return (parts * dead.unsqueeze(1)).sum(0).to(module.blocks.dtype)

    energy = (moments.energy * gram).sum((1, 2))
    variance = ((moments.energy - outer) * gram).sum((1, 2)).clamp_min(0)
    return Ranking(energy, variance, dropped)


def counts(fractions: Sequence[float], units: Sequence[int]) -> list[int]:
    """Whole units per layer; rounding is carried on, so that the total meets the budget."""
    found, carried = [], 0.0
    for fraction, size in zip(fractions, units, strict=True):
        wanted = fraction * size + carried
        whole = min(max(round(wanted), 1), size)
        carried = wanted - whole
        found.append(whole)
    return found


# ---------------------------------------------------------------------------- routed models


def prunable(model: nn.Module) -> dict[str, RoutedFFN | RoutedColumns]:
    """Routed modules whose units a static mask can drop: blocks of neurons, heads."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, RoutedColumns)
        or (isinstance(module, RoutedFFN) and not module.copies)
    }


@contextlib.contextmanager
def all_live(model: nn.Module) -> Iterator[None]:
    """The dense limit of a routed model; its budgets come back after."""
    with kept(model) as routers:
        for router in routers:
            router.set_active(1.0, warn=False)
        yield


def rank(
    model: nn.Module, run: Callable[[Tensor], Any], batches: Iterable[Tensor]
) -> dict[str, Ranking]:
    """Path -> ranking of a routed model's units, on its dense activations.

    Args:
        model: with routed modules.
        run: calls the model on token ids.
        batches: token ids (batch, token).
    """
    found = prunable(model)
    moments = {path: Moments() for path in found}
    neurons = {p: m.experts * m.hidden for p, m in found.items() if isinstance(m, RoutedFFN)}
    if 4 * sum(n * n for n in neurons.values()) <= REFIT_BYTES:
        for path, size in neurons.items():
            moments[path].cross = torch.zeros(size, size)
    with contextlib.ExitStack() as stack, torch.no_grad(), all_live(model):
        for path, module in found.items():
            if isinstance(module, RoutedFFN):
                stack.enter_context(_watched_ffn(module, moments[path]))
            else:
                hook = _watch_heads(module, moments[path])
                stack.callback(module.register_forward_pre_hook(hook).remove)
        for ids in batches:
            run(ids)
    return {
        path: rank_neurons(DenseFFN.of_routed(module), moments[path])
        if isinstance(module, RoutedFFN)
        else rank_heads(module, moments[path])
        for path, module in found.items()
        if moments[path].count
    }


@contextlib.contextmanager
def _watched_ffn(module: Any, moments: Moments) -> Iterator[None]:
    """Inside, the layer runs dense and its neurons are watched."""
    ffn = DenseFFN.of_routed(module)

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        hidden = ffn.hidden(x)
        rows = hidden.reshape(-1, hidden.shape[-1])
        moments.add(rows)
        if moments.cross is not None:
            moments.cross += (rows.float().T @ rows.float()).cpu()
        return ffn.output(hidden)

    module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward


def _watch_heads(module: Any, moments: Moments) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        units, width, _out = module.blocks.shape
        z = args[0].reshape(-1, units * width)
        if module.places is not None:
            z = z.index_select(1, module.places)
        z = z.view(-1, units, width).double()
        moments.add(z, torch.einsum("nhc,nhd->hcd", z, z))

    return hook


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which units stay: path -> (live (N,) bool, bias (D,) or None).

    Attributes:
        down: path -> refitted down projection (F, D).
    """

    layers: Mapping[str, tuple[Tensor, Tensor | None]]
    note: str
    down: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def active(self) -> float:
        """Fraction of units that stay, every layer weighing the same."""
        kept = [float(live.float().mean()) for live, _ in self.layers.values()]
        return sum(kept) / len(kept)


def plan(
    rankings: Mapping[str, Ranking],
    active: Mapping[str, float],
    *,
    compensate: bool,
    note: str,
    refit: bool = False,
) -> Plan:
    """Keep the fraction ``active[path]`` of the units of every layer."""
    paths = [path for path in rankings if path in active]
    whole: dict[str, int] = {}
    for size in {rankings[p].units for p in paths}:  # neurons carry rounding to neurons
        same = [p for p in paths if rankings[p].units == size]
        whole |= dict(zip(same, counts([active[p] for p in same], [size] * len(same)), strict=True))
    chosen = {p: rankings[p].choose(whole[p], compensate=compensate) for p in paths}
    down: dict[str, Tensor] = {}
    for path in paths:
        again = rankings[path].refit
        if refit and again is not None:
            live, _ = chosen[path]
            down[path], bias = again(live)
            chosen[path] = (live, bias)
    return Plan(chosen, note, down)


@contextlib.contextmanager
def pruned(model: nn.Module, chosen: Plan) -> Iterator[None]:
    """Inside, the routed model is its dense model with the plan's units gone for every token."""
    modules = prunable(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(all_live(model))
        for path, (live, bias) in chosen.layers.items():
            module = modules[path]
            if isinstance(module, RoutedFFN):
                stack.enter_context(_prune_ffn(module, live, bias, chosen.down.get(path)))
            else:
                stack.enter_context(_prune_heads(module, live, bias))
        yield


@contextlib.contextmanager
def _prune_ffn(
    module: Any, live: Tensor, bias: Tensor | None, down: Tensor | None
) -> Iterator[None]:
    ffn = DenseFFN.of_routed(module)
    if down is not None:
        ffn = dataclasses.replace(ffn, down=down)

    def kept(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows[live]

    ffn = dataclasses.replace(
        ffn, up=ffn.up[live], gate=kept(ffn.gate), down=ffn.down[live],
        up_bias=kept(ffn.up_bias), gate_bias=kept(ffn.gate_bias),
    )  # fmt: skip

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        return ffn.output(ffn.hidden(x), bias)

    module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _prune_heads(module: Any, live: Tensor, bias: Tensor | None) -> Iterator[None]:
    usual, dropped = module.forward, module.dropped
    mask = live.to(module.blocks.dtype)

    def forward(_: nn.Module, z: Tensor, select: Tensor) -> Tensor:
        y: Tensor = usual(z, mask.expand_as(select))
        return y if bias is None else y + bias

    module.dropped = None  # per token there is nothing to give back: the bias has it all
    module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward
        module.dropped = dropped


# ---------------------------------------------------------------------------- dense models


@contextlib.contextmanager
def pruned_regions(
    model: nn.Module, regions: Sequence[FeedForward], active: float, *, compensate: bool = True
) -> Iterator[None]:
    """Inside, ``model`` (dense) keeps a fraction of every region's neurons.

    Regions carry calibration rows in ``samples["x"]``. The down projections are replaced by copies
    with dead neurons set to zero; the mean of what they gave goes to the bias, or is added to the
    output of the module that owns the projection.
    """
    keep = counts([active] * len(regions), [region.hidden for region in regions])
    with contextlib.ExitStack() as stack, torch.no_grad():
        for region, count in zip(regions, keep, strict=True):
            ffn, moments = DenseFFN.of_region(region), Moments()
            moments.add(ffn.hidden(region.samples["x"]))
            ranking = rank_neurons(ffn, moments)
            live, extra = ranking.choose(count, compensate=compensate)
            owner_path, _, name = region.down.weight_name.rpartition(".")
            owner = model.get_submodule(owner_path)
            weight = getattr(owner, name)
            mask = live.to(weight.dtype)
            masked = weight * (mask.unsqueeze(1) if region.down.transposed else mask)
            stack.enter_context(_replaced(owner, name, masked))
            if extra is not None:
                handle = owner.register_forward_hook(_adds(extra))
                stack.callback(handle.remove)
        yield


def _adds(extra: Tensor) -> Callable[..., Tensor]:
    return lambda _module, _args, y: y + extra


@contextlib.contextmanager
def _replaced(owner: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value, requires_grad=False))
    try:
        yield
    finally:
        setattr(owner, name, before)
