"""A feed-forward layer for many widths, its weights mixed for the width that is live.

Mixture-of-Supernets (Jawahar et al., arXiv:2306.04845): a supernet holds layers of many widths in
one; instead of cutting every one out of the same weights, a router maps the architecture (here the
live width) to a mix of expert weights, ``W(a) = sum over e of g_e(a) W_e``, and the layer is cut
out of the mix. The mix depends on the architecture alone, not on tokens: it is made once and kept.

Shapes: E experts, F neurons, n live ones, D width, H features of the router.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.counters import Counter
from sparsify.runtime.dispatch import HALF, watched
from sparsify.runtime.memo import stamp
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.program import Program
from sparsify.runtime.router import as_parameter, own
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, nested, routed

if TYPE_CHECKING:
    from typing_extensions import Self

linear = torch.nn.functional.linear


@routed
class ArchitectureRouter(Prefix):
    """The dial of live neurons, and the mix of experts that belongs to where it stands.

    ``g = softmax over experts of (out relu(inner a + inner_bias) + out_bias)``, a in (0, 1] the
    live share of the neurons: the paper's two-layer router on the architecture's encoding.

    Args:
        inner, inner_bias: (H,).
        out: (E, G, H); out_bias: (E, G): G = 1, one mix for the layer, or G = size, one for every
            neuron.
        size, options: of :class:`Prefix`.
    """

    def __init__(
        self,
        inner: Tensor,
        inner_bias: Tensor,
        out: Tensor,
        out_bias: Tensor,
        *,
        size: int,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        fits = out.dim() == 3 and out.shape[:2] == out_bias.shape and out.shape[1] in (1, size)
        if not fits or inner.shape != inner_bias.shape or inner.shape != out.shape[2:]:
            shapes = ", ".join(str(tuple(t.shape)) for t in (inner, inner_bias, out, out_bias))
            raise BadInput(f"the parts of a router of {size} neurons do not fit: {shapes}")
        self.inner, self.inner_bias = as_parameter(inner, True), as_parameter(inner_bias, True)
        self.out, self.out_bias = as_parameter(out, True), as_parameter(out_bias, True)

    @property
    def experts(self) -> int:
        """E."""
        return int(self.out.shape[0])

    def mix(self) -> Tensor:
        """(E, 1) or (E, n) weights of the experts at the present width, in float32 or wider."""
        groups = 1 if self.out.shape[1] == 1 else self.count
        share = self.count / self.size
        features = torch.relu(self.inner * share + self.inner_bias)
        scores = self.out[:, :groups] @ features + self.out_bias[:, :groups]
        return torch.softmax(scores.float() if scores.dtype in HALF else scores, dim=0)

    def options(self) -> dict[str, Any]:
        shape = [*self.out.shape]
        return {**super().options(), "out": shape, "dtype": dtype_name(self.out.dtype)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        (experts, groups, features), dtype = options["out"], dtype_of(options["dtype"])
        made = cls(
            torch.empty(features, dtype=dtype),
            torch.empty(features, dtype=dtype),
            torch.empty(experts, groups, features, dtype=dtype),
            torch.empty(experts, groups, dtype=dtype),
            size=options["size"],
            **cls.budget_arguments(options),
        )
        return made.restore(options)


@dataclasses.dataclass
class MixCounter(Counter):
    """Beside the usual counts (units are neurons).

    Attributes:
        mixed: times that weights were mixed; reused: calls served by weights mixed before.
        mixed_rows: weight rows read by mixing.
    """

    mixed: int = 0
    reused: int = 0
    mixed_rows: int = 0

    def reset(self) -> None:
        super().reset()
        self.mixed = self.reused = self.mixed_rows = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Mixed:
    """The layer of one architecture: up, gate, down (n, D), biases (n,)."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None


@routed
class SupernetFFN(RoutedModule):
    """``y = act(x up(a).T, x gate(a).T) down(a) + bias`` with the first n neurons of a mix.

    Args:
        up, gate, down: (E, F, D), one neuron per row, the most important first; ``gate`` None where
            the layer has none. ``down`` is the down projection transposed.
        up_bias, gate_bias: (E, F) or None; down_bias: (D,) or None, of all experts.
        activation: elementwise program on (up,) or (up, gate).
        router: the width's dial and the mix.
        order: int64 (F,): neuron i is the dense model's neuron ``order[i]``.
        kept: how many architectures' weights are kept mixed, the latest used; 0 = none (mixed anew
            for every call). Each holds the live neurons once more.

    Kept weights are dropped when a weight or the router's change, are moved or replaced (see
    :mod:`sparsify.runtime.memo`) and by ``train()``; turning the dial back finds them again. They
    are not used while autograd or autocast watches. (After a write through ``parameter.data`` call
    :meth:`forget`.)
    """

    counter: MixCounter
    order: Tensor

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
        router: ArchitectureRouter,
        order: Tensor,
        kept: int = 4,
    ) -> None:
        super().__init__()
        parts = [part for part in (up, gate, down) if part is not None]
        if up.dim() != 3 or any(part.shape != up.shape for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise BadInput(f"up, gate and down of a supernet must all be (E, F, D), not {shapes}")
        if (router.experts, router.size) != up.shape[:2]:
            raise BadInput(
                f"a router of {router.experts} experts and {router.size} neurons cannot mix"
                f" {up.shape[0]} of {up.shape[1]}"
            )
        self.up, self.down = as_parameter(up), as_parameter(down)
        self.gate = None if gate is None else as_parameter(gate)
        self.up_bias = None if up_bias is None else as_parameter(up_bias)
        self.gate_bias = None if gate_bias is None else as_parameter(gate_bias)
        self.down_bias = None if down_bias is None else as_parameter(down_bias)
        self.register_buffer("order", order)
        self.activation = activation
        self.router = router
        self.kept = kept
        self.counter = MixCounter()
        self.forget()

    @classmethod
    def from_dense(
        cls,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        order: Tensor,
        **options: Any,
    ) -> Self:
        """Identical experts from dense layout: up, gate (F, D), down (D, F)."""
        experts = options["router"].experts

        def copies(rows: Tensor | None, trains: bool = False) -> Tensor | None:
            if rows is None:
                return None
            packed = rows.detach()[order].repeat(experts, *[1] * rows.dim())
            packed = packed.view(experts, *rows.shape)
            return packed.requires_grad_(trains or rows.requires_grad)

        made_up, made_down = copies(up), copies(down.t(), down.requires_grad)
        assert made_up is not None and made_down is not None
        return cls(
            made_up,
            copies(gate),
            made_down,
            copies(up_bias),
            copies(gate_bias),
            None if down_bias is None else own(down_bias),
            order=order,
            **options,
        )

    def forget(self) -> None:
        """Drop all that is kept."""
        self._stamp: tuple[Any, ...] = ()
        self._mixed: OrderedDict[int, Mixed] = OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        layer = self._layer(x)
        size = self.router.size
        tokens = x.numel() // x.shape[-1]
        self.counter.seen(tokens, size, tokens * self.router.count)
        sums = [linear(x, layer.up, layer.up_bias)]
        if layer.gate is not None:
            sums.append(linear(x, layer.gate, layer.gate_bias))
        hidden = self.activation(*sums).to(x.dtype)
        self.counter.rows += tokens * len(layer.up)
        return linear(hidden, layer.down.t(), self.down_bias)

    def _layer(self, x: Tensor) -> Mixed:
        """The layer of the present architecture, mixed now or before."""
        usable = self.kept and self.dispatch != "grouped" and not self.training
        if not usable or watched(x, self):
            return self._mix()
        now = stamp(self)
        if now is None or now != self._stamp:
            self.forget()
            self._stamp = now or ()
        count = self.router.count
        known = self._mixed.get(count)
        if known is not None:
            self._mixed.move_to_end(count)
            self.counter.reused += 1
            return known
        made = self._mixed[count] = self._mix()
        while len(self._mixed) > self.kept:
            self._mixed.popitem(last=False)
        return made

    def _mix(self) -> Mixed:
        """Mix the live neurons; dead ones are not read."""
        count, weights = self.router.count, self.router.mix()
        self.counter.mixed += 1

        def mix(packed: Tensor | None) -> Tensor | None:
            if packed is None:
                return None
            live = packed[:, :count]
            if live.dim() == 3:
                self.counter.mixed_rows += live.shape[0] * live.shape[1]
            g = weights.to(live.device).view(*weights.shape, *[1] * (live.dim() - 2))
            return (live * g).sum(0).to(packed.dtype)

        up, down = mix(self.up), mix(self.down)
        assert up is not None and down is not None
        return Mixed(up, mix(self.gate), down, mix(self.up_bias), mix(self.gate_bias))

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"_stamp": (), "_mixed": OrderedDict()}
        return dict(self.__dict__) | empty  # copies hold other weights

    def dense_weights(self) -> dict[str, Tensor]:
        """The layer of full width: bit for bit the dense one while the experts are identical."""
        with torch.no_grad():
            before, self.router.setting = self.router.setting, (1.0, None, 1.0)
            try:
                weights = self.router.mix()
            finally:
                self.router.setting = before

            def whole(packed: Tensor) -> Tensor:
                same = all(torch.equal(one, packed[0]) for one in packed[1:])
                g = weights.view(*weights.shape, *[1] * (packed.dim() - 2))
                rows = packed[0] if same else (packed * g).sum(0).to(packed.dtype)
                return torch.empty_like(rows).index_copy_(0, self.order, rows)

            found = {"up": whole(self.up), "down": whole(self.down).t()}
            for role in ("gate", "up_bias", "gate_bias"):
                packed = getattr(self, role)
                if packed is not None:
                    found[role] = whole(packed)
            if self.down_bias is not None:
                found["down_bias"] = self.down_bias
        return found

    def options(self) -> dict[str, Any]:
        given = ("gate", "up_bias", "gate_bias", "down_bias")
        return {
            "shape": [*self.up.shape],
            "dtype": dtype_name(self.up.dtype),
            **{name: getattr(self, name) is not None for name in given},
            "activation": self.activation.to_json(),
            "router": self.router.spec(),
            "kept": self.kept,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        (experts, size, width), dtype = options["shape"], dtype_of(options["dtype"])

        def empty(*shape: int, given: str = "") -> Tensor | None:
            return torch.empty(shape, dtype=dtype) if not given or options[given] else None

        return cls(
            torch.empty(experts, size, width, dtype=dtype),
            empty(experts, size, width, given="gate"),
            torch.empty(experts, size, width, dtype=dtype),
            empty(experts, size, given="up_bias"),
            empty(experts, size, given="gate_bias"),
            empty(width, given="down_bias"),
            activation=Program.from_json(options["activation"]),
            router=nested(options["router"], ArchitectureRouter),
            order=torch.empty(size, dtype=torch.int64),
            kept=options["kept"],
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        """Of a token once its architecture's weights are mixed."""
        router = self.router
        live = router.live_units(router.active if active is None else active)
        weights = live * self.up.shape[2] * (2 + (self.gate is not None))
        extra = live * sum(b is not None for b in (self.up_bias, self.gate_bias))
        extra += 0 if self.down_bias is None else self.down_bias.numel()
        return Cost(2 * weights, (weights + extra) * self.up.element_size())

    def extra_repr(self) -> str:
        experts, size, width = self.up.shape
        gated = ", gated" if self.gate is not None else ""
        return f"mix of {experts} layers of {size} neurons, width={width}{gated}"
