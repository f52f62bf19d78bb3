"""Forms of routed feed-forward layers: by masks, in branches, or as an operator of ONNX Runtime's.

By masks, all neurons of all experts are computed and those of dead experts set to zero. The other
two skip what is dead; experts that every token uses are one dense layer beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.codegen.onnx import moe
from sparsify.codegen.onnx.branches import summed
from sparsify.codegen.onnx.custom import layer
from sparsify.codegen.onnx.forms import dead_to_zero, form, spread
from sparsify.core import Refused
from sparsify.runtime.codes import weights_of
from sparsify.runtime.compressed import CompressedFFN
from sparsify.runtime.conditioned import ConditionedFFN
from sparsify.runtime.dropped import at_budget
from sparsify.runtime.few_bits import ROLES, FewBitsFFN
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.inside import LiveNeurons
from sparsify.runtime.modality import ModalityFFN, ModalityLinear, ModalityModule
from sparsify.runtime.supernet import SupernetFFN

linear = nn.functional.linear
PARTS = ("up", "gate", "up_bias", "gate_bias", "down")


def ways(ffn: RoutedFFN, asked: str) -> str:
    """How a layer is written where ``asked`` is ``mask``, ``branch``, ``moe`` or ``custom``: that,
    if it can.

    ``dense`` where all is live.
    """
    if ffn._thin is not None:
        return "mask"
    if ffn.router.all_live:
        return "dense"
    packed = isinstance(ffn, FewBitsFFN)  # its weights are made whole, from codes
    if asked == "moe" and (packed or _unlike(ffn)):
        asked = "branch"
    if asked == "custom" and not layer.able(ffn.activation):
        asked = "branch"
    return "mask" if packed or ffn.router.shared == ffn.experts else asked


def _unlike(ffn: RoutedFFN) -> bool:
    """Whether ONNX Runtime's MoE computes something else."""
    mix = getattr(ffn.router, "mix", None)
    # it has no weights below zero
    below_zero = mix is not None and not 0 <= float(mix.detach()) <= 1
    return below_zero or moe.activation_of(ffn.activation) is None


@form(RoutedFFN)
class FfnForm(RoutedFFN):
    """x (..., D) -> (..., D).

    Attributes:
        way: ``mask``; ``branch``: experts compute the tokens that use them
            (:mod:`sparsify.codegen.onnx.branches`); ``moe`` (:mod:`sparsify.codegen.onnx.moe`);
            ``custom`` (:mod:`sparsify.codegen.onnx.custom`); ``dense``: all are live.
    """

    way = "mask"
    kernel_activation = ""
    first = 0  # expert with a stand-in
    shared_at: Tensor | None
    alone_at: Tensor
    first_layer: Tensor
    first_bias: Tensor | None
    second_layer: Tensor
    experts_up: Tensor
    experts_gate: Tensor | None
    experts_up_bias: Tensor | None
    experts_gate_bias: Tensor | None
    experts_down: Tensor
    shared_down: Tensor
    stand_in: Tensor | None
    slope: Tensor | None

    def prepare(self) -> None:
        self._fix_budget()
        self.way = ways(self, self.way)
        if self.way not in ("branch", "moe"):
            return
        router = self.router
        order = list(range(self.experts)) if router.order is None else router.order.tolist()
        shared, alone = sorted(order[: router.shared]), sorted(order[router.shared :])
        self.register_buffer("shared_at", torch.tensor(shared) if shared else None)
        self.register_buffer("alone_at", torch.tensor(alone))
        for name in PARTS:
            packed = getattr(self, name)
            both = (None, None) if packed is None else (_some(packed, shared), _some(packed, alone))
            self._own(f"shared_{name}", None if both[0] is None else both[0].flatten(0, 1))
            self._own(f"experts_{name}", both[1])
        if self.way == "moe":
            self._lay_out()

    def _own(self, name: str, tensor: Tensor | None) -> None:
        held = None if tensor is None or not tensor.numel() else nn.Parameter(tensor, False)
        self.register_parameter(name, held)

    def _lay_out(self) -> None:
        """Weights as ONNX Runtime's kernel reads them."""
        self.kernel_activation = moe.activation_of(self.activation) or ""
        up_bias, gate_bias = self.experts_up_bias, self.experts_gate_bias
        bias = None
        if up_bias is not None or gate_bias is not None:
            zero = self.experts_up.new_zeros(self.experts_up.shape[:2])
            gates = zero if gate_bias is None else gate_bias
            ups = zero if up_bias is None else up_bias
            bias = moe.first_layer(ups, None if self.gate is None else gates)
        self._own("first_layer", moe.first_layer(self.experts_up, self.experts_gate))
        self._own("first_bias", bias)
        self._own("second_layer", self.experts_down.transpose(1, 2).contiguous())
        for name in PARTS:
            self._own(f"experts_{name}", None)

    def _fix_budget(self) -> None:
        """Of the tables of stand-ins, what the present budget reads; shared experts have none."""
        active, slopes, dropped = self.router.active, None, None
        self.first = self.router.shared if self.router.order is None else 0
        if not self.router.all_live and self.dropped is not None:
            dropped = at_budget(self.dropped.detach(), self.dropped_at, active)[self.first :]
        if not self.router.all_live and self.slopes is not None:
            slopes = at_budget(self.slopes.detach(), self.dropped_at, active)
        self.register_buffer("stand_in", dropped)
        self.register_buffer("slope", slopes)

    def forward(self, x: Tensor) -> Tensor:
        if self.router.all_live and self._thin is None:
            return self._every(x)
        estimated = self.slopes is not None and not self.router.all_live
        scores = self.router.scores(x) if estimated else None
        select = self.router(x) if scores is None else self.router(x, scores)
        return self.routed(x, select, scores)

    def _every(self, x: Tensor) -> Tensor:
        y = self.neurons(x) @ self.down.flatten(0, 1)
        return y if self.down_bias is None else y + self.down_bias

    def routed(self, x: Tensor, select: Tensor, scores: Tensor | None) -> Tensor:
        """select (..., N) weights, 0 = dead; scores (..., R) where stand-ins need them."""
        live = select != 0
        if self.way == "custom" and torch.compiler.is_exporting():
            return self._custom(x, select, live, scores)
        if self.way in ("branch", "moe"):
            each = select.reshape(-1, self.experts)
            y = self._skipping(x.reshape(-1, self.width), each)
            return self._finished(y.view(x.shape), select, live, scores).to(x.dtype)
        hidden, thin = self.neurons(x), self._thin
        if thin is not None:
            hidden, mine = _thinned(thin, hidden)
            keep = spread(live, self.hidden) & mine
        else:
            keep = spread(live, self.hidden)
        if not self.router.unit_weights:
            hidden = hidden * spread(select, self.hidden)
        y = dead_to_zero(hidden, keep).to(self.down.dtype) @ self.down.flatten(0, 1)
        if self.down_bias is not None:
            y = y + self.down_bias
        if thin is not None and self.offset is not None:
            y = y + select @ self.offset
        return self._finished(y, select, live, scores).to(x.dtype)

    def _custom(self, x: Tensor, select: Tensor, live: Tensor, scores: Tensor | None) -> Tensor:
        """One operator, stand-ins too where nothing comes between."""
        names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
        tensors: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        if type(self)._modulated is not RoutedFFN._modulated:
            y = layer.marked(x, select, tensors, self.activation)
            return self._finished(y, select, live, scores)
        tensors["dropped"] = self.stand_in
        if self.slope is not None:
            tensors.update(scores=scores, slopes=self.slope)
        return layer.marked(x, select, tensors, self.activation)

    def _finished(self, y: Tensor, select: Tensor, live: Tensor, scores: Tensor | None) -> Tensor:
        """With what dead experts give."""
        y = self._modulated(y, select)
        if not self.router.all_live:
            for left, right in self._stand_ins(live, scores):
                y = y + left.to(y.dtype) @ right.to(y.dtype)
        return y

    def _skipping(self, x: Tensor, select: Tensor) -> Tensor:
        """x (T, D), select (T, N) -> the sum of live experts, with the bias."""
        y = None if self.down_bias is None else self.down_bias.expand_as(x)
        if self.shared_at is not None:
            hidden = self._hidden_of(x, *(getattr(self, f"shared_{n}") for n in PARTS[:-1]))
            if not self.router.unit_weights:
                hidden = hidden * spread(select.index_select(1, self.shared_at), self.hidden)
            # rank 3: of two ranks 2 and a sum ONNX Runtime makes a Gemm, which reads no codes
            always = (hidden.unsqueeze(0) @ self.shared_down).squeeze(0)
            y = always if y is None else y + always
            select = select.index_select(1, self.alone_at)
        if self.way == "moe":
            found = moe.experts(
                x, select, self.first_layer, self.first_bias, self.second_layer,
                self.kernel_activation, weigh=not self.router.unit_weights,
            )  # fmt: skip
            return found if y is None else y + found

        def expert(x: Tensor, *parts: Tensor) -> Tensor:
            return self._hidden_of(x, *parts[:-1]) @ parts[-1]

        packed = [getattr(self, f"experts_{name}") for name in PARTS]
        y = torch.zeros_like(x) if y is None else y
        return summed(y, x, select, packed, expert, weigh=not self.router.unit_weights)

    def _hidden_of(
        self,
        x: Tensor,
        up: Tensor,
        gate: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
    ) -> Tensor:
        """x (n, D), weights (f, D) and (f,) -> (n, f) neurons."""
        sums = [linear(x, up, up_bias)]
        if gate is not None:
            sums.append(linear(x, gate, gate_bias))
        return self.activation(*sums)

    def _stand_ins(self, live: Tensor, scores: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        found = []
        if self.stand_in is not None:
            found.append((~live[..., self.first :], self.stand_in))
        if self.slope is not None and scores is not None:
            dead = scores.masked_fill(live[..., self.router.shared :], 0)
            found.append((dead, self.slope))
        return found


def _some(packed: Tensor, experts: list[int]) -> Tensor:
    """Of (N, ...) these experts': a view where they are neighbours."""
    packed = packed.detach()
    first = experts[0] if experts else 0
    if experts == list(range(first, first + len(experts))):
        return packed[first : first + len(experts)]
    return packed[experts]


def _thinned(thin: LiveNeurons, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(..., F) neurons -> less their centres, and which of them are live."""
    values = hidden if thin.centre is None else hidden - thin.centre.to(hidden.dtype)
    scores = (values.float().abs() * thin.scale).unflatten(-1, (thin.experts, thin.size))
    return values, thin.live(scores).flatten(-2)


@form(CompressedFFN)
class CompressedForm(FfnForm, CompressedFFN):
    """Dead experts multiply, element by element, what the live ones give."""

    vector: Tensor

    def prepare(self) -> None:
        super().prepare()
        self.register_buffer("vector", self._vectors().detach())

    def _modulated(self, y: Tensor, select: Tensor) -> Tensor:
        mine = select[..., self.router.shared :]
        dead = 1 - mine if self.router.unit_weights else (mine == 0).to(y.dtype)
        return y + y * (dead @ self.vector.to(y.dtype))


@form(FewBitsFFN)
class FewBitsForm(FfnForm, FewBitsFFN):
    """Weights as int8 codes and half-precision scales, as wide as the widest code needs."""

    def prepare(self) -> None:
        super().prepare()
        for role in ROLES:
            if f"{role}_codes" not in self._parameters:
                continue
            scales: Tensor = getattr(self, f"{role}_scales").detach().view(torch.float16)
            codes = self._codes(role, scales)
            delattr(self, f"{role}_codes")
            self.register_buffer(f"{role}_codes8", codes)
            self.register_buffer(f"{role}_scales16", scales.clone())

    def _codes(self, role: str, scales: Tensor) -> Tensor:
        """int8 (N, m, D): a weight over its scale is a whole number."""
        weights = super().weights(role).float().unflatten(-1, (scales.shape[-1], -1))
        by = torch.where(scales > 0, scales, torch.inf).float()
        codes: Tensor = (weights / by.unsqueeze(-1)).round().to(torch.int8)
        return codes.flatten(-2)

    def weights(self, role: str, start: int = 0, size: int | None = None) -> Tensor:
        if size is not None or start:
            raise Refused("experts in few bits are exported whole")
        codes, scales = getattr(self, f"{role}_codes8"), getattr(self, f"{role}_scales16")
        return weights_of(codes, scales, self.router.weight.dtype)


@form(ConditionedFFN)
class ConditionedForm(FfnForm, ConditionedFFN):
    """x (B, ..., D), condition (B, ..., C) with one row per sample."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        if self.router.all_live:
            return self._every(x)
        select = self.router(condition.reshape(x.shape[0], -1))
        select = select.view(x.shape[0], *[1] * (x.dim() - 2), -1)
        if self.way != "mask":
            select = select.expand(*x.shape[:-1], -1)
        return self.routed(x, select, None)


@form(SupernetFFN)
class SupernetForm(SupernetFFN):
    """The layer of the present width, mixed once: no other is in the file."""

    def prepare(self) -> None:
        with torch.no_grad():
            mixed = self._mix()
        for name in ("up", "gate", "down", "up_bias", "gate_bias"):
            tensor = getattr(mixed, name)
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, False))

    def forward(self, x: Tensor) -> Tensor:
        sums = [linear(x, self.up, self.up_bias)]
        if self.gate is not None:
            sums.append(linear(x, self.gate, self.gate_bias))
        hidden = self.activation(*sums).to(x.dtype)
        return linear(hidden, self.down.t(), self.down_bias)


class _Modal(ModalityModule):
    """Every modality's layer on every token; the token's own is kept.

    An id that names no modality, an error in eager, gives zeros.
    """

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        kinds = self.kinds(ids).reshape(*x.shape[:-1], 1)
        y = dead_to_zero(self.one(x, 0), kinds == 0)
        for modality in range(1, self.modalities):
            y = torch.where(kinds == modality, self.one(x, modality), y)
        return y


@form(ModalityFFN)
class ModalityFfnForm(_Modal, ModalityFFN):
    """See :class:`_Modal`."""


@form(ModalityLinear)
class ModalityLinearForm(_Modal, ModalityLinear):
    """See :class:`_Modal`."""
