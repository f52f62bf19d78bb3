"""A routed feed-forward layer whose experts are chosen by the sample's conditioning vector.

The router sees the noise level (whatever modulates the block), never the tokens, so all tokens of a
sample use the same experts, and so does every call with the same condition. Outside of training the
choice is therefore made once per condition, and the weights of the chosen experts are fused (copied
side by side) once per choice: one dense layer of the live neurons runs for the whole step, as in
MoDE (arXiv:2412.12953, expert fusion and caching).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.counters import Counter
from sparsify.runtime.dispatch import watched
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.memo import stamp
from sparsify.runtime.spec import routed

if TYPE_CHECKING:
    from typing_extensions import Self

CONDITIONS = 4096  # choices remembered: one bool per expert each


@dataclasses.dataclass
class FusionCounter(Counter):
    """Work saved by the cache, beside the usual counts.

    Attributes:
        scored: conditions that the router scored; recalled: conditions whose choice was known.
        fused: times that experts' weights were put side by side; reused: samples' calls served by
            weights that were fused before.
        copied: weight rows (neurons) copied by fusing.
    """

    scored: int = 0
    recalled: int = 0
    fused: int = 0
    reused: int = 0
    copied: int = 0

    def reset(self) -> None:
        super().reset()
        self.scored = self.recalled = self.fused = self.reused = self.copied = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Fused:
    """The live experts as one dense layer: up, gate, down (n, D); biases (n,)."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None


@routed
class ConditionedFFN(RoutedFFN):
    """N experts of m neurons; which are live follows from the condition (B, C), not from tokens.

    Args:
        sets: how many sets of experts are kept fused, the latest used; 0 = none (fused anew for
            every call). Each holds the weights of its live experts once more.
        options: of :class:`RoutedFFN`; the router reads the condition: its weight is (R, C).

    The cache is dropped when a weight changes in place, is replaced or moved, when the dial is
    turned, and by ``train()``. It is not used while autograd or autocast watches. (A write through
    ``parameter.data`` leaves no trace: call :meth:`forget` after one.)
    """

    counter: FusionCounter

    def __init__(self, *tensors: Tensor | None, sets: int = 16, **options: Any) -> None:
        super().__init__(*tensors, **options)  # type: ignore[arg-type]
        if not self.router.unit_weights or self.dropped is not None or self.slopes is not None:
            raise BadInput(
                "experts chosen by a condition have weight one and no stand-ins",
                help="use a router with rule='top-k', without dropped and slopes",
            )
        self.counter = FusionCounter()
        self.sets = sets
        self.forget()

    def forget(self) -> None:
        """Drop all that is remembered."""
        self._stamp: tuple[Any, ...] = ()
        self._choices: OrderedDict[bytes, tuple[bool, ...]] = OrderedDict()
        self._fused: OrderedDict[tuple[bool, ...], Fused] = OrderedDict()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, ..., D), condition (B, ..., C) with one row per sample -> (B, ..., D)."""
        batch = x.shape[0]
        rows = x.reshape(batch, -1, self.width)
        given = condition.reshape(batch, -1)
        if self.dispatch != "grouped" and not self.training and not watched(x, self):
            return self._cached(rows, given).view(x.shape)
        self.counter.scored += batch
        select = self.router(given).unsqueeze(1).expand(-1, rows.shape[1], -1)
        flat, chosen = rows.reshape(-1, self.width), select.reshape(-1, self.experts)
        if self.router.all_live and self.dispatch != "grouped":
            y = self._dense(flat, chosen if chosen.requires_grad else None)
        else:
            y = self._grouped(flat, chosen, None)
        return y.view(x.shape)

    def _cached(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, T, D): samples that use the same experts are one dense layer over fused weights."""
        batch, tokens, _ = x.shape
        if self.router.all_live:
            return self._dense(x.reshape(-1, self.width), None).view_as(x)
        self._check()
        together: dict[tuple[bool, ...], list[int]] = {}
        for sample, choice in enumerate(self._choose(condition)):
            together.setdefault(choice, []).append(sample)
        self.counter.seen(
            batch * tokens,
            self.experts,
            sum(sum(choice) * tokens * len(mine) for choice, mine in together.items()),
        )
        y = torch.empty_like(x)
        for choice, mine in together.items():
            layer = self._fuse(choice, len(mine))
            part = (x if len(mine) == batch else x[mine]).reshape(-1, self.width)
            hidden = self._live(part, layer)
            result = hidden @ layer.down
            self.counter.rows += len(part) * sum(choice)
            if self.down_bias is not None:
                result = result + self.down_bias
            shaped = result.view(len(mine), tokens, self.width)
            if len(mine) == batch:
                return shaped
            y[mine] = shaped
        return y

    def _live(self, x: Tensor, layer: Fused) -> Tensor:
        """(n, D) -> (n, neurons of the live experts)."""
        sums = [nn.functional.linear(x, layer.up, layer.up_bias)]
        if layer.gate is not None:
            sums.append(nn.functional.linear(x, layer.gate, layer.gate_bias))
        return self.activation(*sums).to(layer.down.dtype)

    def _choose(self, condition: Tensor) -> list[tuple[bool, ...]]:
        """Which experts each sample uses; the router runs on conditions not met before."""
        raw = condition.detach().cpu().contiguous().view(torch.uint8).numpy()
        keys = [row.tobytes() for row in raw]
        new = {key: sample for sample, key in enumerate(keys) if key not in self._choices}
        self.counter.scored += len(new)
        self.counter.recalled += len(keys) - len(new)
        if new:
            # one row at a time: the choice must not depend on what else is in the batch
            for key, sample in new.items():
                select = self.router(condition[sample : sample + 1])
                self._choices[key] = tuple((select[0] != 0).tolist())
        chosen = [self._choices[key] for key in keys]
        for key in keys:
            self._choices.move_to_end(key)
        while len(self._choices) > (CONDITIONS if self.sets else 0):
            self._choices.popitem(last=False)
        return chosen

    def _fuse(self, choice: tuple[bool, ...], samples: int) -> Fused:
        """The live experts' weights side by side; views where they lie side by side already."""
        known = self._fused.get(choice)
        if known is not None:
            self._fused.move_to_end(choice)
            self.counter.reused += samples
            return known
        ids = [unit for unit, live in enumerate(choice) if live]
        adjacent = bool(ids) and ids[-1] - ids[0] + 1 == len(ids)

        def pick(packed: Tensor | None) -> Tensor | None:
            if packed is None:
                return None
            if adjacent:
                return packed[ids[0] : ids[-1] + 1].flatten(0, 1)
            return packed[ids].flatten(0, 1)

        up, down = pick(self.up), pick(self.down)
        assert up is not None and down is not None
        made = Fused(up, pick(self.gate), down, pick(self.up_bias), pick(self.gate_bias))
        self.counter.fused += 1
        self.counter.reused += samples - 1
        if not adjacent:
            self.counter.copied += len(ids) * self.hidden * (2 + (self.gate is not None))
        self._fused[choice] = made
        while len(self._fused) > self.sets:
            self._fused.popitem(last=False)
        return made

    def _check(self) -> None:
        """Forget what was made of other weights, or at another budget."""
        made_of = stamp(self)
        now = made_of and (*made_of, self.router.setting, self.router.rule)
        if now is None or now != self._stamp:
            self.forget()
            self._stamp = now or ()

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # copies hold other weights
        empty: dict[str, Any] = {"_stamp": (), "_choices": OrderedDict(), "_fused": OrderedDict()}
        return state | empty

    def options(self) -> dict[str, Any]:
        return {**super().options(), "sets": self.sets}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        module = super().from_options(options)
        module.sets = options["sets"]
        return module

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.sets} sets kept fused"
