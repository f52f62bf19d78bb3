"""Forms of routed feed-forward layers: all neurons of all experts, dead experts' set to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.codegen.onnx.branches import enter, leave
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
MOST = 16  # experts with branches of their own: each costs about 10 us of ONNX Runtime a call


@form(RoutedFFN)
class FfnForm(RoutedFFN):
    """x (..., D) -> (..., D).

    With ``skip``, experts that no token uses are not computed, and others on their tokens only
    (:mod:`sparsify.codegen.onnx.branches`).
    """

    skip = False
    first = 0  # expert with a stand-in
    stand_in: Tensor | None
    slope: Tensor | None

    def prepare(self) -> None:
        self._fix_budget()
        able = type(self) is FfnForm and self._thin is None and self.experts <= MOST
        self.skip = self.skip and able and not self.router.all_live
        if self.skip:  # weights apart: a branch reads its own
            for name in ("up", "gate", "down", "up_bias", "gate_bias"):
                packed = getattr(self, name)
                parts = () if packed is None else packed.detach().unbind(0)
                for expert, part in enumerate(parts):
                    self.register_parameter(f"{name}_{expert}", nn.Parameter(part, False))

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
        if self.skip:
            y = self._branches(x.reshape(-1, self.width), select.reshape(-1, self.experts))
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

    def _finished(self, y: Tensor, select: Tensor, live: Tensor, scores: Tensor | None) -> Tensor:
        """With what dead experts give."""
        y = self._modulated(y, select)
        if not self.router.all_live:
            for left, right in self._stand_ins(live, scores):
                y = y + left.to(y.dtype) @ right.to(y.dtype)
        return y

    def _branches(self, x: Tensor, select: Tensor) -> Tensor:
        """x (T, D), select (T, N) -> the sum of live experts, with the bias."""
        y = torch.zeros_like(x) if self.down_bias is None else self.down_bias.expand_as(x)
        live = select != 0
        some = live.any(0)
        for expert in range(self.experts):
            mine, any_token = live[:, expert], some[expert]
            rows = enter(x, mine, any_token)
            sums = [self._sum(rows, "up", expert)]
            if self.gate is not None:
                sums.append(self._sum(rows, "gate", expert))
            hidden = self.activation(*sums)
            if not self.router.unit_weights:
                hidden = hidden * enter(select[:, expert : expert + 1], mine, any_token)
            y = leave(y, hidden @ getattr(self, f"down_{expert}"), mine, any_token)
        return y

    def _sum(self, x: Tensor, role: str, expert: int) -> Tensor:
        bias: Tensor | None = getattr(self, f"{role}_bias_{expert}", None)
        return linear(x, getattr(self, f"{role}_{expert}"), bias)

    def _stand_ins(self, live: Tensor, scores: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        found = []
        if self.stand_in is not None:
            found.append((~live[..., self.first :], self.stand_in))
        if self.slope is not None and scores is not None:
            dead = scores.masked_fill(live[..., self.router.shared :], 0)
            found.append((dead, self.slope))
        return found


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
        return self.routed(x, select.view(x.shape[0], *[1] * (x.dim() - 2), -1), None)


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
