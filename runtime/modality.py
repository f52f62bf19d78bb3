"""Layers with one set of weights per modality: the token's modality says which, nothing is scored.

Mixture-of-Transformers (Liang et al., arXiv:2411.04996): every modality has its own feed-forward
layer and its own projections, while attention stays global over all tokens. Each token is
multiplied by its own modality's weights only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.counters import Counter
from sparsify.runtime.dispatch import join_graph
from sparsify.runtime.program import Program
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self

Ranges = Sequence[tuple[int, int]]
linear = nn.functional.linear


@dataclasses.dataclass
class ModalityCounter(Counter):
    """``rows_of``: modality -> rows multiplied by its weights."""

    rows_of: dict[int, int] = dataclasses.field(default_factory=dict)

    def reset(self) -> None:
        super().reset()
        self.rows_of = {}

    def ran(self, modality: int, rows: int) -> None:
        """``rows`` rows were multiplied by the weights of ``modality``."""
        self.rows += rows
        self.rows_of[modality] = self.rows_of.get(modality, 0) + rows


class ModalityModule(RoutedModule):
    """What both layers share: from ids to the rows of each modality.

    Args:
        modalities: M.
        ranges: (first, last) token ids of modalities 1, 2, ...; all other tokens are modality 0.
            Empty: the ids that ``forward`` gets are modality ids.
    """

    counter: ModalityCounter

    def __init__(self, modalities: int, ranges: Ranges) -> None:
        super().__init__()
        self.counter = ModalityCounter()
        if modalities < 2 or (ranges and len(ranges) != modalities - 1):
            raise BadInput(
                f"{modalities} modalities with {len(ranges)} ranges of token ids",
                help="one range for every modality but the first, and two modalities at least",
            )
        self.modalities = modalities
        self.ranges = tuple((int(a), int(b)) for a, b in ranges)

    @property
    def width(self) -> int:
        """D: features of x."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Features of the result."""
        raise NotImplementedError

    def one(self, x: Tensor, modality: int) -> Tensor:
        """x (n, D), tokens of one modality -> (n, outputs)."""
        raise NotImplementedError

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (..., D), ids integers (...) -> (..., outputs).

        Raises:
            BadInput: an id that names no modality.
        """
        flat, kinds = x.reshape(-1, self.width), self.kinds(ids).reshape(-1)
        if len(kinds) != len(flat):
            raise BadInput(
                f"{len(kinds)} modality ids for {len(flat)} tokens",
                help="give one id per token, in the shape (batch, tokens)",
            )
        counts = self._counts(kinds)
        self.counter.seen(len(flat), self.modalities, len(flat))
        live = [modality for modality, count in enumerate(counts) if count]
        if len(live) == 1 and self.dispatch == "auto":
            y = self.one(flat, live[0])
            self.counter.ran(live[0], len(flat))
        else:
            y = flat.new_zeros(len(flat), self.outputs)
            for modality in live:
                rows = (kinds == modality).nonzero().flatten()
                part = self.one(flat.index_select(0, rows), modality)
                self.counter.ran(modality, len(rows))
                y = y.to(part.dtype).index_copy(0, rows, part)
        return join_graph(y, x).view(*x.shape[:-1], self.outputs)

    def kinds(self, ids: Tensor) -> Tensor:
        """Modality of every id, int64."""
        if not self.ranges:
            return ids.long()
        found = torch.zeros_like(ids, dtype=torch.int64)
        for modality, (first, last) in enumerate(self.ranges, 1):
            found = found.masked_fill((ids >= first) & (ids <= last), modality)
        return found

    def _counts(self, kinds: Tensor) -> list[int]:
        if kinds.numel():
            low, high = (int(v) for v in torch.stack([kinds.min(), kinds.max()]).tolist())
            if low < 0 or high >= self.modalities:
                wrong = low if low < 0 else high
                raise BadInput(
                    f"modality id {wrong}: the layer has modalities 0 to {self.modalities - 1}",
                    help=f"convert with modalities={high + 1} or more, or correct the ids",
                )
        return [int(c) for c in torch.bincount(kinds, minlength=self.modalities).tolist()]

    def reaches(self) -> dict[str, Any]:
        """The JSON form of what this class holds."""
        return {"modalities": self.modalities, "ranges": [list(r) for r in self.ranges]}

    def extra_repr(self) -> str:
        return f"{self.modalities} modalities, {self.width} -> {self.outputs}"


@routed
class ModalityFFN(ModalityModule):
    """A whole feed-forward layer per modality.

    Args:
        up, gate: (M, F, D); down: (M, D, F); ``gate`` None where the layer has none.
        up_bias, gate_bias: (M, F) or None; down_bias: (M, D) or None.
        activation: elementwise program on (up,) or (up, gate).
    """

    def __init__(
        self,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        down_bias: Tensor | None,
        *,
        activation: Program,
        ranges: Ranges = (),
    ) -> None:
        super().__init__(len(up), ranges)
        self.up, self.down = as_parameter(up), as_parameter(down)
        for name, packed in (
            ("gate", gate), ("up_bias", up_bias), ("gate_bias", gate_bias),
            ("down_bias", down_bias),
        ):  # fmt: skip
            setattr(self, name, None if packed is None else as_parameter(packed))
        self.activation = activation

    gate: nn.Parameter | None
    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    @property
    def width(self) -> int:
        return int(self.up.shape[2])

    @property
    def outputs(self) -> int:
        return int(self.down.shape[1])

    def one(self, x: Tensor, modality: int) -> Tensor:
        def bias(packed: Tensor | None) -> Tensor | None:
            return None if packed is None else packed[modality]

        sums = [linear(x, self.up[modality], bias(self.up_bias))]
        if self.gate is not None:
            sums.append(linear(x, self.gate[modality], bias(self.gate_bias)))
        return linear(self.activation(*sums), self.down[modality], bias(self.down_bias))

    def dense_weights(self) -> dict[str, Tensor]:
        names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
        packed = {name: getattr(self, name) for name in names}
        return {name: t[0].detach() for name, t in packed.items() if t is not None}

    def options(self) -> dict[str, Any]:
        given = {n: getattr(self, n) is not None for n in ("gate", "up_bias", "gate_bias")}
        return {
            **self.reaches(),
            **given,
            "down_bias": self.down_bias is not None,
            "shape": list(self.up.shape[1:]),
            "outputs": self.outputs,
            "dtype": dtype_name(self.up.dtype),
            "activation": self.activation.to_json(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        m, (f, d), out = options["modalities"], options["shape"], options["outputs"]
        dtype = dtype_of(options["dtype"])

        def empty(given: bool, *shape: int) -> Tensor | None:
            return torch.empty(m, *shape, dtype=dtype) if given else None

        return cls(
            torch.empty(m, f, d, dtype=dtype),
            empty(options["gate"], f, d),
            torch.empty(m, out, f, dtype=dtype),
            empty(options["up_bias"], f),
            empty(options["gate_bias"], f),
            empty(options["down_bias"], out),
            activation=Program.from_json(options["activation"]),
            ranges=[(a, b) for a, b in options["ranges"]],
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        matrices = self.up[0].numel() * (1 + (self.gate is not None)) + self.down[0].numel()
        every = sum(p.numel() for p in self.parameters()) // self.modalities
        return Cost(2 * matrices, every * self.up.element_size())


@routed
class ModalityLinear(ModalityModule):
    """A projection per modality: weight (M, out, in), bias (M, out) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, ranges: Ranges = ()) -> None:
        super().__init__(len(weight), ranges)
        self.weight = as_parameter(weight)
        self.bias = None if bias is None else as_parameter(bias)

    @property
    def width(self) -> int:
        return int(self.weight.shape[2])

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[1])

    def one(self, x: Tensor, modality: int) -> Tensor:
        bias = None if self.bias is None else self.bias[modality]
        return linear(x, self.weight[modality], bias)

    def dense_weights(self) -> dict[str, Tensor]:
        found = {"weight": self.weight[0].detach()}
        return found | ({} if self.bias is None else {"bias": self.bias[0].detach()})

    def options(self) -> dict[str, Any]:
        return {
            **self.reaches(),
            "shape": list(self.weight.shape[1:]),
            "bias": self.bias is not None,
            "dtype": dtype_name(self.weight.dtype),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        m, (out, width), dtype = (
            options["modalities"],
            options["shape"],
            dtype_of(options["dtype"]),
        )
        bias = torch.empty(m, out, dtype=dtype) if options["bias"] else None
        ranges = [(a, b) for a, b in options["ranges"]]
        return cls(torch.empty(m, out, width, dtype=dtype), bias, ranges=ranges)

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        weights = self.weight[0].numel()
        read = weights + (0 if self.bias is None else self.outputs)
        return Cost(2 * weights, read * self.weight.element_size())


def copies(tensor: Tensor | None, modalities: int) -> Tensor | None:
    """``tensor`` once per modality; trains if it does."""
    if tensor is None:
        return None
    many = tensor.detach().expand(modalities, *tensor.shape).clone()
    return many.requires_grad_(tensor.requires_grad)
