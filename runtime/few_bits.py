"""Routed feed-forward layer whose experts are stored in few bits, each in as many as it needs.

The weights are integer codes with a scale per group (:mod:`sparsify.runtime.codes`), experts of one
width side by side; they are turned into numbers for a product and forgotten after it, those of dead
experts not at all. Memory and the bytes that a token reads shrink; the arithmetic does not.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.codes import WIDTHS, pack, packed_bytes, quantised, unpack, weights_of
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import Plan
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.ffn_parts import cost_of, parts_of
from sparsify.runtime.router import Router
from sparsify.runtime.spec import routed

if TYPE_CHECKING:
    from typing_extensions import Self

ROLES = ("up", "gate", "down")


@routed
class FewBitsFFN(RoutedFFN):
    """A :class:`RoutedFFN` with ``up``, ``gate`` and ``down`` as codes.

    ``up`` and the others can be read as they can be there: the whole tensor is made of the codes,
    each time. They cannot be trained.

    Args:
        tensors, options: of :class:`RoutedFFN`.
        bits: of every expert's weights, N numbers of WIDTHS.
        group: neighbours of a row (of D weights) that share a scale.
        importance: (N, D): what an error of an expert counts for, by the input of up and gate that
            it meets; None = one.
        filled: False leaves codes and scales to be loaded.
    """

    def __init__(
        self,
        *tensors: Tensor | None,
        bits: Sequence[int],
        group: int,
        importance: Tensor | None = None,
        filled: bool = True,
        **options: Any,
    ) -> None:
        up, gate, down, *_ = tensors
        assert up is not None and down is not None
        experts, _, width = up.shape
        if len(bits) != experts or any(b not in WIDTHS for b in bits):
            raise BadInput(f"{experts} experts cannot be stored in {list(bits)} bits")
        if group < 1 or width % group:
            raise BadInput(f"groups of {group} do not divide {width} weights")
        super().__init__(*tensors, **options)  # type: ignore[arg-type]
        if self.copies or self.inside is not None:
            raise BadInput("experts in few bits are parts of one layer, with nothing inside")
        self.bits = tuple(int(b) for b in bits)
        self.group = group
        for role, weight in zip(ROLES, (up, gate, down), strict=True):
            if weight is not None:
                delattr(self, role)  # found by __getattr__ from here on
                counts = None if role == "down" or importance is None else importance.unsqueeze(1)
                self._store(role, weight, counts, filled)

    def _store(self, role: str, weight: Tensor, importance: Tensor | None, filled: bool) -> None:
        experts, rows, width = weight.shape
        scales = torch.zeros(
            experts, rows, width // self.group, dtype=torch.float16, device=weight.device
        )
        parts = []
        for depth, members in self._widths():
            if filled:
                counts = None if importance is None else importance[members]
                codes, scales[members] = quantised(weight[members], depth, self.group, counts)
                parts.append(pack(codes.flatten(1), depth).flatten())
            else:
                size = len(members) * packed_bytes(rows * width, depth)
                parts.append(torch.zeros(size, dtype=torch.uint8, device=weight.device))
        self.register_parameter(f"{role}_codes", nn.Parameter(torch.cat(parts), False))
        # as bits: no cast of the model to another dtype rounds them, and nobody trains them
        self.register_parameter(f"{role}_scales", nn.Parameter(scales.view(torch.int16), False))

    @classmethod
    def of(
        cls, ffn: RoutedFFN, bits: Sequence[int], group: int, importance: Tensor | None = None
    ) -> Self:
        """From a layer in full precision."""
        tensors = (ffn.up, ffn.gate, ffn.down, ffn.up_bias, ffn.gate_bias, ffn.down_bias)
        return cls(
            *tensors, bits=bits, group=group, importance=importance, activation=ffn.activation,
            router=ffn.router, dropped=ffn.dropped, slopes=ffn.slopes, dropped_at=ffn.dropped_at,
            order=ffn.order,
        )  # fmt: skip

    # -- codes

    def _widths(self) -> Iterator[tuple[int, list[int]]]:
        """(width, its experts in order), widths ascending, as they are stored."""
        for width in sorted(set(self.bits)):
            yield width, [e for e, b in enumerate(self.bits) if b == width]

    def weights(self, role: str, start: int = 0, size: int | None = None) -> Tensor:
        """Experts ``start`` to ``start + size`` of ``up``, ``gate`` or ``down``: (size, m, D)."""
        scales: Tensor = getattr(self, f"{role}_scales").detach().view(torch.float16)
        packed: Tensor = getattr(self, f"{role}_codes").detach()
        end = self.experts if size is None else start + size
        count = self.hidden * self.width
        codes = torch.empty(end - start, count, dtype=torch.int8, device=packed.device)
        place = 0
        for width, members in self._widths():
            each = packed_bytes(count, width)
            low, high = bisect.bisect_left(members, start), bisect.bisect_left(members, end)
            if low < high:
                block = packed[place + low * each : place + high * each].view(-1, each)
                codes[[e - start for e in members[low:high]]] = unpack(block, width, count)
            place += len(members) * each
        shaped = codes.view(-1, self.hidden, self.width)
        return weights_of(shaped, scales[start:end], self.router.weight.dtype)

    def __getattr__(self, name: str) -> Any:
        # only for what is nowhere else: a layer without a gate has None there
        return self.weights(name) if name in ROLES else super().__getattr__(name)

    def bytes_of(self, expert: int) -> int:
        """Of an expert's weights, scales too."""
        matrices = 2 + self._gated
        codes = packed_bytes(self.hidden * self.width, self.bits[expert])
        return matrices * (codes + 2 * self.hidden * self.width // self.group)

    @property
    def mean_bits(self) -> float:
        """Of a weight, its share of the scales too."""
        weights = self.experts * (2 + self._gated) * self.hidden * self.width
        return 8 * sum(map(self.bytes_of, range(self.experts))) / weights

    @property
    def _gated(self) -> bool:
        return "gate_codes" in self._parameters

    # -- sizes: without making the weights

    @property
    def experts(self) -> int:
        return len(self.bits)

    @property
    def hidden(self) -> int:
        return int(self.up_scales.shape[1])

    @property
    def width(self) -> int:
        return int(self.up_scales.shape[2]) * self.group

    # -- forward

    def _can_pick(self, x: Tensor) -> bool:
        return False  # it reads rows where they lie

    @property
    def _anchor(self) -> Tensor:
        codes: Tensor = self.up_codes
        return codes

    def _pieces(self, work: Plan) -> list[Iterable[Tensor | None]]:
        def live(role: str) -> Iterator[Tensor | None]:
            return (self.weights(role, s.start, s.size) if s.count else None for s in work.segments)

        gate: Iterable[Tensor | None] = live("gate") if self._gated else work.split(None)
        return [live("down"), live("up"), gate, work.split(self.up_bias),
                work.split(self.gate_bias)]  # fmt: skip

    # -- description, cost

    @property
    def hosts(self) -> tuple[str, ...]:
        return ()

    def options(self) -> dict[str, Any]:
        return {**super().options(), "bits": list(self.bits), "group": self.group}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        tensors, rest = parts_of(options)
        return cls(*tensors, bits=options["bits"], group=options["group"], filled=False, **rest)

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        router: Router = self.router
        whole = cost_of(self, active)
        live = router.live_units(router.active if active is None else active)
        plain = (2 + self._gated) * self.hidden * self.width * router.weight.element_size()
        mean = sum(map(self.bytes_of, range(self.experts))) / self.experts
        return Cost(whole.flops, whole.bytes + live * (mean - plain), whole.cache)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.mean_bits:.3g} bits a weight"
