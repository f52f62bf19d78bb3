"""Routed hidden sub-dimensions (MoHD): blocks of a layer's input (and output) features are units.

Mixture of Hidden-Dimensions (Chen et al., arXiv:2412.05644): some sub-dimensions are shared (always
live), each token adds specialised ones that a router picks; what is live is scaled up so that the
norm stays (activation scaling), and a block-diagonal linear over permuted features mixes the
sub-dimensions again (group fusion, the identity at first). Weights are stored sub-dimension after
sub-dimension, so what is dead is not read.

Shapes: T tokens, D features of x in N sub-dimensions of c, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.program import Program
from sparsify.runtime.router import Router, as_parameter
from sparsify.runtime.spec import RoutedModule, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class HiddenRouter(Router):
    """Selects sub-dimensions of x by the magnitudes of its features, and scales what is live.

    Scores are linear in ``|x|``: a sub-dimension is worth as much at ``-x`` as at ``x``, which no
    score that is linear in ``x`` can say. Live sub-dimensions get the weight
    ``(N / live) ** power``: 1 when all are live, whatever the power.

    Args:
        weight, bias, options: of :class:`Router`.
        power: initial exponent of the activation scaling (it trains): 1 is the paper's factor
            total / active, 0 none.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, power: float = 0.0, **options: Any
    ) -> None:
        super().__init__(weight, bias, **options)
        self.power = nn.Parameter(self.weight.detach().new_tensor(power))

    def scores(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., R), in float32 or wider."""
        return super().scores(x.abs())

    def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        """x (..., D) -> select (..., N): 0 where dead, else the scaling factor."""
        select = super().forward(x, scores)
        live = (select != 0).sum(-1, keepdim=True)
        factor = (self.units / live.clamp_min(1)) ** self.power.to(torch.float32)
        return select * factor.to(select.dtype)


def fuse(y: Tensor, mixing: Tensor) -> Tensor:
    """Group fusion: feature j of every group becomes a mix of the features j of all groups.

    Args:
        y: (T, N*c), group after group; mixing: (c, N, N), ``mixing[j][m, n]`` from group m to n.
    """
    width, groups, _ = mixing.shape
    grouped = y.view(len(y), groups, width).permute(2, 0, 1)
    return (grouped @ mixing).permute(1, 2, 0).reshape(len(y), -1)


def unmixed(groups: int, width: int, like: Tensor) -> Tensor:
    """(width, groups, groups): the mixing that leaves everything as it is."""
    eye = torch.eye(groups, dtype=like.dtype, device=like.device)
    return eye.expand(width, groups, groups).clone().requires_grad_(like.is_floating_point())


def _mixing_cost(mixing: Tensor | None) -> Cost:
    if mixing is None:
        return Cost()
    return Cost(2 * mixing.numel(), mixing.numel() * mixing.element_size())


@routed
class HiddenFFN(RoutedModule):
    """A feed-forward layer that reads, for every token, only live sub-dimensions of its input.

    Args:
        router: selects among the N sub-dimensions.
        up, gate: their input columns by sub-dimension; ``gate`` None where the layer has none.
        down: its output rows by the same sub-dimensions.
        activation: elementwise program on (up,) or (up, gate).
        both: dead sub-dimensions are not written either; ``still`` (N, c) stands in for them (the
            mean output where calibrated). Else every output is computed.
        mixing: (c, N, N) group fusion of the output, or None.
    """

    counts: ClassVar[bool] = False  # its three projections count

    def __init__(
        self,
        router: HiddenRouter,
        up: RoutedColumns,
        gate: RoutedColumns | None,
        down: RoutedRows,
        *,
        activation: Program,
        both: bool = False,
        still: Tensor | None = None,
        mixing: Tensor | None = None,
    ) -> None:
        super().__init__()
        parts = [part for part in (up, gate, down) if part is not None]
        if any(part.units != router.units for part in parts):
            raise BadInput(
                f"a router of {router.units} sub-dimensions cannot route layers of"
                f" {', '.join(str(part.units) for part in parts)}"
            )
        if both and still is None:
            raise BadInput("sub-dimensions that are not written need a stand-in")
        self.router = router
        self.up = up
        self.gate = gate
        self.down = down
        self.activation = activation
        self.both = both
        self.still = None if still is None else as_parameter(still, True)
        self.mixing = None if mixing is None else as_parameter(mixing)

    @property
    def width(self) -> int:
        """D."""
        return int(self.up.blocks.shape[0] * self.up.blocks.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        rows = x.reshape(-1, self.width)
        select = self.router(rows)
        sums = [self.up(rows, select)]
        if self.gate is not None:
            sums.append(self.gate(rows, select))
        hidden = self.activation(*sums).to(x.dtype)
        y = self.down(hidden, select if self.both else torch.ones_like(select))
        if self.both or self.mixing is not None:
            y = self._packed(y)
            if self.both and self.still is not None:
                dead = (select == 0).to(y.dtype).unsqueeze(2)
                y = y + (dead * self.still).flatten(1)
            y = self._unpacked(y if self.mixing is None else fuse(y, self.mixing))
        result: Tensor = y.view(x.shape)
        return result

    def _packed(self, y: Tensor) -> Tensor:
        """Features in the order of the sub-dimensions."""
        return y if self.down.places is None else y.index_select(1, self.down.places)

    def _unpacked(self, y: Tensor) -> Tensor:
        if self.down.places is None:
            return y
        return torch.zeros_like(y).index_copy(1, self.down.places, y)

    def options(self) -> dict[str, Any]:
        return {
            "router": self.router.spec(),
            "up": self.up.spec(),
            "gate": None if self.gate is None else self.gate.spec(),
            "down": self.down.spec(),
            "activation": self.activation.to_json(),
            "both": self.both,
            "still": self.still is not None,
            "mixing": self.mixing is not None,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        gate, down = options["gate"], nested(options["down"], RoutedRows)
        units, rows, _ = down.blocks.shape
        like = down.blocks
        return cls(
            nested(options["router"], HiddenRouter),
            nested(options["up"], RoutedColumns),
            None if gate is None else nested(gate, RoutedColumns),
            down,
            activation=Program.from_json(options["activation"]),
            both=options["both"],
            still=torch.empty(units, rows, dtype=like.dtype) if options["still"] else None,
            mixing=unmixed(units, rows, like.detach()) if options["mixing"] else None,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = self.router.active if active is None else active
        share = self.router.live_units(share) / self.router.units
        total = self.router.cost(active) + self.up.cost(share)
        total += self.down.cost(share if self.both else 1.0)
        if self.gate is not None:
            total += self.gate.cost(share)
        return total + _mixing_cost(self.mixing)

    def extra_repr(self) -> str:
        written = "live ones written" if self.both else "all written"
        return f"width={self.width}, {self.router.units} sub-dimensions, {written}"


@routed
class HiddenColumns(RoutedColumns):
    """A projection that reads live sub-dimensions only; group fusion may mix its outputs.

    Args:
        blocks, bias, dropped, places: of :class:`RoutedColumns`.

    Attributes:
        mixing: (out / n, n, n) of n groups of output features, or None (see :meth:`mix`).
    """

    def __init__(
        self,
        blocks: Tensor,
        bias: Tensor | None = None,
        *,
        dropped: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        super().__init__(blocks, bias, dropped=dropped, places=places)
        self.mixing: nn.Parameter | None = None

    def mix(self, mixing: Tensor) -> None:
        """Add group fusion of the outputs."""
        self.mixing = as_parameter(mixing)

    def forward(self, z: Tensor, select: Tensor) -> Tensor:
        """z (..., in), select (..., N) -> (..., out)."""
        y = super().forward(z, select)
        if self.mixing is None:
            return y
        return fuse(y.reshape(-1, y.shape[-1]), self.mixing).view(y.shape)

    def options(self) -> dict[str, Any]:
        groups = None if self.mixing is None else self.mixing.shape[1]
        return {**super().options(), "mixing": groups}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        made = super().from_options(options)
        groups = options["mixing"]
        if groups is not None:
            like = made.blocks.detach()
            made.mix(unmixed(groups, options["outputs"] // groups, like))
        return made

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        return super().cost(active, context) + _mixing_cost(self.mixing)
