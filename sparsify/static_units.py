"""Units that a static mask can drop: what each is worth, and the model without some of them.

One class per kind of routed module: neurons of a feed-forward layer, heads of an attention, input
features of a projection. Each watches its module on calibration text, ranks the units by what they
add to the module's output, and runs the module without those that a plan drops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.program import Program

linear = nn.functional.linear

REFIT_RIDGE = 0.01  # relative to the mean variance of the units that stay


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

    def add_rows(self, values: Tensor) -> None:
        """values (..., N), with all pairs where they are wanted."""
        rows = values.detach().reshape(-1, values.shape[-1])
        self.add(rows)
        if self.cross is not None:
            self.cross += (rows.float().T @ rows.float()).cpu()

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
        refit: live units (N,) bool -> (weight rows (N, D), bias (D,)) that give the dense output
            back as well as the live ones can; None where that was not measured.
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


def _ranked(rows: Tensor, moments: Moments) -> Ranking:
    """Units that are one number times one weight row (N, D) each."""
    wide = rows.detach().double()
    size = wide.square().sum(1)
    mean = moments.mean

    def dropped(dead: Tensor) -> Tensor:
        return ((mean * dead) @ wide).to(rows.dtype)

    def refit(live: Tensor) -> tuple[Tensor, Tensor]:
        assert moments.cross is not None
        covariance = moments.cross.double() / moments.count - torch.outer(mean, mean)
        kept = covariance[live][:, live]
        kept.diagonal().add_(REFIT_RIDGE * kept.diagonal().mean())
        found = torch.zeros_like(wide)
        found[live] = torch.linalg.solve(kept, covariance[live] @ wide)
        return found.to(rows.dtype), (mean @ (wide - found)).to(rows.dtype)

    variance = (moments.energy - mean.square()).clamp_min(0)
    crossed = refit if moments.cross is not None else None
    return Ranking(moments.energy * size, variance * size, dropped, crossed)


# ---------------------------------------------------------------------------- kinds of units


class Units:
    """The units of one routed module."""

    module: Any
    count: int
    weight = 1.0  # of this module among those of its kind, where a budget is a mean over modules
    pairs = 0  # second moments that a refit needs

    def watched(self, moments: Moments) -> contextlib.AbstractContextManager[None]:
        """Inside, the module runs dense and its units are watched."""
        raise NotImplementedError

    def ranking(self, moments: Moments) -> Ranking:
        """What each unit is worth."""
        raise NotImplementedError

    def pruned(
        self, live: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, only ``live`` units run; ``bias`` is added; ``rows`` replace the weights."""
        raise NotImplementedError


class Neurons(Units):
    """Of a RoutedFFN, in packed order."""

    def __init__(self, module: RoutedFFN) -> None:
        self.module = module
        self.count = module.experts * module.hidden
        self.pairs = self.count**2

    def watched(self, moments: Moments) -> contextlib.AbstractContextManager[None]:
        ffn = DenseFFN.of_routed(self.module)

        def forward(_: nn.Module, x: Tensor) -> Tensor:
            hidden = ffn.hidden(x)
            moments.add_rows(hidden)
            return ffn.output(hidden)

        return running(self.module, forward)

    def ranking(self, moments: Moments) -> Ranking:
        return _ranked(self.module.down.flatten(0, 1), moments)

    def pruned(
        self, live: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> contextlib.AbstractContextManager[None]:
        ffn = DenseFFN.of_routed(self.module)
        down = ffn.down if rows is None else rows

        def kept(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[live]

        ffn = dataclasses.replace(
            ffn, up=ffn.up[live], gate=kept(ffn.gate), down=down[live],
            up_bias=kept(ffn.up_bias), gate_bias=kept(ffn.gate_bias),
        )  # fmt: skip
        return running(self.module, lambda _, x: ffn.output(ffn.hidden(x), bias))


class Inputs(Units):
    """Input features of a RoutedLinear."""

    def __init__(self, module: RoutedLinear) -> None:
        self.module = module
        self.count = module.columns.shape[0]
        self.pairs = self.count**2
        self.weight = float(module.columns.numel())

    def watched(self, moments: Moments) -> contextlib.AbstractContextManager[None]:
        def forward(_: nn.Module, x: Tensor, *gates: Tensor) -> Tensor:
            moments.add_rows(x)
            return linear(x, self.module.columns.t(), self.module.bias)

        return running(self.module, forward)

    def ranking(self, moments: Moments) -> Ranking:
        return _ranked(self.module.columns, moments)

    def pruned(
        self, live: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> contextlib.AbstractContextManager[None]:
        weight = (self.module.columns if rows is None else rows)[live].t()
        own = self.module.bias
        total = own if bias is None else bias if own is None else own + bias
        return running(self.module, lambda _, x, *gates: linear(x[..., live], weight, total))


class Heads(Units):
    """Of a RoutedColumns."""

    def __init__(self, module: RoutedColumns) -> None:
        self.module = module
        self.count = module.units

    @contextlib.contextmanager
    def watched(self, moments: Moments) -> Iterator[None]:
        """Inside, the mean (H, c) and second moment (H, c, c) of every head are taken."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            units, width, _out = self.module.blocks.shape
            z = args[0].reshape(-1, units * width)
            if self.module.places is not None:
                z = z.index_select(1, self.module.places)
            z = z.view(-1, units, width).double()
            moments.add(z, torch.einsum("nhc,nhd->hcd", z, z))

        handle = self.module.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def ranking(self, moments: Moments) -> Ranking:
        blocks = self.module.blocks.detach().double()  # (H, c, out)
        gram = blocks @ blocks.transpose(1, 2)
        mean = moments.mean
        outer = mean.unsqueeze(2) * mean.unsqueeze(1)

        def dropped(dead: Tensor) -> Tensor:
            parts = torch.einsum("hc,hco->ho", mean, blocks)
            return (parts * dead.unsqueeze(1)).sum(0).to(self.module.blocks.dtype)

        energy = (moments.energy * gram).sum((1, 2))
        variance = ((moments.energy - outer) * gram).sum((1, 2)).clamp_min(0)
        return Ranking(energy, variance, dropped)

    @contextlib.contextmanager
    def pruned(self, live: Tensor, bias: Tensor | None, rows: Tensor | None) -> Iterator[None]:
        usual, dropped = self.module.forward, self.module.dropped
        mask = live.to(self.module.blocks.dtype)

        def forward(_: nn.Module, z: Tensor, select: Tensor) -> Tensor:
            y: Tensor = usual(z, mask.expand_as(select))
            return y if bias is None else y + bias

        self.module.dropped = None  # per token there is nothing to give back: the bias has it all
        try:
            with running(self.module, forward):
                yield
        finally:
            self.module.dropped = dropped


@contextlib.contextmanager
def running(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, the module runs ``forward(module, *inputs)``."""
    module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward


def units_of(module: nn.Module) -> Units | None:
    """The units of a routed module, where a static mask can drop them."""
    if isinstance(module, RoutedFFN):
        return None if module.copies else Neurons(module)
    if isinstance(module, RoutedColumns):
        return Heads(module)
    return Inputs(module) if isinstance(module, RoutedLinear) else None
