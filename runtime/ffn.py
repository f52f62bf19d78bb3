"""The routed feed-forward layer: neurons in blocks, every token computes the blocks it uses.

``y = sum over live experts e of w_e * act(x @ gate_e.T, x @ up_e.T) @ down_e  +  bias``. All three
matrices hold one neuron per row, expert after expert, so an expert (and a run of experts) is one
contiguous slice of each. With every expert live and weight one this is the dense layer, its neurons
in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import HALF, LiveRows, Plan, Sum, join_graph, plan, watched
from sparsify.runtime.dropped import at_budget
from sparsify.runtime.ffn_parts import check_parts, cost_of, options_of, parts_of
from sparsify.runtime.inside import LiveNeurons, Run, weighted
from sparsify.runtime.program import Program
from sparsify.runtime.router import Router, as_parameter, own
from sparsify.runtime.spec import RoutedModule, routed

if TYPE_CHECKING:
    from typing_extensions import Self

linear = nn.functional.linear


@routed
class RoutedFFN(RoutedModule):
    """N experts of m neurons each, and the router that selects among them.

    Args:
        up, gate, down: (N, m, D), one neuron per row; ``gate`` None where the layer has none.
            ``down`` is the down projection transposed.
        up_bias, gate_bias: (N, m) or None; down_bias: (D,) or None.
        activation: elementwise program on (up,) or (up, gate).
        router: selects among the N experts.
        dropped: (N, D), (P, N, D) or None: added for every expert that a token does not use (the
            mean of what it would have contributed); vanishes when all are live.
        slopes: (R, D), (P, R, D) or None: added times the router's score for every routed expert
            that a token does not use.
        dropped_at: the P ascending budgets that (P, ..., D) tables were fitted at.
        order: int64 (F,): position i holds the dense model's neuron ``order[i]``; None = in order.
        copies: each expert is a whole dense layer (sparse upcycling), not a part of one.
        inside: selects among the neurons of live experts; None = all of them are read. A dead one
            counts as its centre: ``offset`` (N, D) is what a live expert gives with all there.
    """

    computes_masked: ClassVar[bool] = True
    order: Tensor | None

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
        router: Router,
        dropped: Tensor | None = None,
        slopes: Tensor | None = None,
        dropped_at: Sequence[float] = (),
        order: Tensor | None = None,
        copies: bool = False,
        inside: LiveNeurons | None = None,
    ) -> None:
        super().__init__()
        check_parts(up, gate, down, activation, router)
        if slopes is not None and router.order is not None:
            raise BadInput("slopes need a router that scores experts in order")
        if copies and router.unit_weights:
            raise BadInput(
                "experts that are whole layers need weights that sum to one",
                help="use a router with rule='softmax-top-k'",
            )
        self.up = as_parameter(up)
        self.gate = None if gate is None else as_parameter(gate)
        self.down = as_parameter(down)
        self.up_bias = None if up_bias is None else as_parameter(up_bias)
        self.gate_bias = None if gate_bias is None else as_parameter(gate_bias)
        self.down_bias = None if down_bias is None else as_parameter(down_bias)
        self.dropped = None if dropped is None else as_parameter(dropped)
        self.slopes = None if slopes is None else as_parameter(slopes)
        self.dropped_at = tuple(float(a) for a in dropped_at)
        self.register_buffer("order", order)
        self.activation = activation
        self.router = router
        self.copies = copies
        self._put_inside(inside)

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
        order: Tensor | None = None,
        experts: int,
        activation: Program,
        router: Router,
        dropped: Tensor | None = None,
        slopes: Tensor | None = None,
        dropped_at: Sequence[float] = (),
        copies: bool = False,
    ) -> Self:
        """From dense layout: up, gate (F, D), down (D, F), biases (F,), (F,), (D,).

        Neuron ``order[i]`` becomes neuron i; expert e is neurons ``e*m`` to ``(e+1)*m`` of those.
        With ``copies``, every expert is the whole layer.
        """
        hidden = up.shape[0]
        if not copies and hidden % experts:
            raise BadInput(
                f"{hidden} neurons do not divide into {experts} experts",
                help=f"one of: {', '.join(str(n) for n in range(2, 65) if hidden % n == 0)}",
            )

        def block(rows: Tensor, trains: bool = False) -> Tensor:
            if copies:
                packed = rows.detach().repeat(experts, *[1] * (rows.dim() - 1))
            else:
                packed = rows.detach()[order] if order is not None else rows.detach().clone()
            shaped = packed.reshape(experts, -1, *rows.shape[1:]).contiguous()
            return shaped.requires_grad_(trains or rows.requires_grad)

        return cls(
            block(up),
            None if gate is None else block(gate),
            block(down.t(), down.requires_grad),  # t() under no_grad forgets it
            None if up_bias is None else block(up_bias),
            None if gate_bias is None else block(gate_bias),
            None if down_bias is None else own(down_bias),
            activation=activation,
            router=router,
            dropped=dropped,
            slopes=slopes,
            dropped_at=dropped_at,
            order=None if copies else order,
            copies=copies,
        )

    # -- sizes

    @property
    def experts(self) -> int:
        """N."""
        return int(self.up.shape[0])

    @property
    def hidden(self) -> int:
        """m: neurons of one expert."""
        return int(self.up.shape[1])

    @property
    def width(self) -> int:
        """D."""
        return int(self.up.shape[2])

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        found: Tensor | None = self.lowered(x)
        if found is not None:
            return found
        rows = x.reshape(-1, self.width)
        estimated = self.slopes is not None and not self.router.all_live
        scores = self.router.scores(x) if estimated else None
        # Not flattened: a rule may choose among the tokens of one sequence.
        select = self.router(x) if scores is None else self.router(x, scores)
        select = select.reshape(-1, self.experts)
        scores = None if scores is None else scores.reshape(len(rows), -1)
        if self.router.all_live and self.dispatch != "grouped" and self._thin is None:
            y = self._dense(rows, select if select.requires_grad else None)
        elif self.dispatch == "masked":
            y = self._masked(rows, select, scores)
        elif self.dispatch != "grouped" and self._can_pick(rows):
            y = self._picked(rows, select, scores)
        else:
            y = self._grouped(rows, select, scores)
        return y.view(x.shape)

    def _dense(self, x: Tensor, select: Tensor | None) -> Tensor:
        """All experts live with weight one: one computation over the packed weights."""
        self.counter.seen(len(x), self.experts, len(x) * self.experts)
        self.counter.rows += len(x) * self.experts
        hidden = self._hidden(x, select, self.up, self.gate, self.up_bias, self.gate_bias)
        hidden, down = hidden.to(self.down.dtype), self.down.flatten(0, 1)
        return (
            hidden @ down if self.down_bias is None else torch.addmm(self.down_bias, hidden, down)
        )

    def _grouped(self, x: Tensor, select: Tensor, scores: Tensor | None) -> Tensor:
        """Each expert on the tokens that use it."""
        work = plan(select, fuse=self.dispatch == "auto")
        self.counter.seen(work.tokens, work.units, work.live)
        total = Sum(work.tokens, self.down_bias, self.width, x)
        weighs = select.requires_grad or not self.router.unit_weights
        self._by_expert(x, work, select if weighs else None, total)
        if self._thin is not None and self.offset is not None:
            total.add(None, select, self.offset)
        if not work.all_live:
            total.total = self._modulated(total.value(), select)
            for left, right in self._stand_ins(work.mask, scores):
                total.add(None, left, right)
        return join_graph(total.value(), x, self._anchor).to(x.dtype)

    def _masked(self, x: Tensor, select: Tensor, scores: Tensor | None) -> Tensor:
        """Every expert on every token, dead pairs times zero: nothing is skipped, for training."""
        # Forward and backward of 512 tokens at 576/1536, 64 experts half live, one busy CPU thread:
        # 77 ms with routers training (grouped 113, dense 73), 109 ms with all (grouped 167).
        mask = select != 0
        self.counter.seen(len(x), self.experts, int(mask.sum()))
        self.counter.rows += len(x) * self.experts
        total = Sum(len(x), self.down_bias, self.width, x)
        thin = self._thin
        if thin is None:
            hidden = self._hidden(x, select, self.up, self.gate, self.up_bias, self.gate_bias)
        else:
            hidden = weighted(thin.mask(self.neurons(x), mask), select, self.hidden)
            if self.offset is not None:
                total.add(None, select, self.offset)
        total.add(None, hidden, self.down.flatten(0, 1))
        total.total = self._modulated(total.value(), select)
        for left, right in self._stand_ins(mask, scores):
            total.add(None, left, right)
        return total.value().to(x.dtype)

    def _by_expert(self, x: Tensor, work: Plan, select: Tensor | None, total: Sum) -> None:
        weights = [None] * len(work.segments) if select is None else work.pairs(select)
        thin, runs = self._thin, list[Run]()
        pieces = self._pieces(work)
        for segment, weight, down, *first in zip(work.segments, weights, *pieces, strict=True):
            if not segment.count:
                continue
            assert down is not None
            mine = x if segment.rows is None else x.index_select(0, segment.rows)
            hidden = self._hidden(mine, weight if thin is None else None, *first)
            self.counter.rows += len(mine) * segment.size
            if thin is None:
                total.add(segment.rows, hidden, down.flatten(0, 1))
            else:
                run = Run(hidden, segment.start, segment.rows, weight, down.flatten(0, 1))
                runs.append(run)
        if thin is not None:
            few = x.device.type == "cpu" and x.dtype not in HALF and not watched(x, self)
            thin.add(runs, total, few=few)

    @property
    def _anchor(self) -> Tensor:
        """What the result hangs on, for ``backward``, where no expert was live."""
        return self.up

    def _pieces(self, work: Plan) -> list[Iterable[Tensor | None]]:
        """Down, up and gate weights, up and gate biases: of each one piece per segment."""
        packed = (self.down, self.up, self.gate, self.up_bias, self.gate_bias)
        return [work.split(p) for p in packed]

    def _can_pick(self, x: Tensor) -> bool:
        """Whether :meth:`_picked` applies: few tokens, on CPU, and nothing watches."""
        # Grouping pays for every live expert, picking for every token. Half live at 576/1536, one
        # busy CPU thread: 64 experts picked 0.94 / 2.6 / 10 ms at 1 / 8 / 32 tokens, grouped 1.4 /
        # 10.7 / 14 ms; 8 experts picked 0.80 ms, grouped 0.57 ms at 1 token.
        few = self.experts > 16 and 0 < 2 * len(x) <= self.experts
        return few and x.device.type == "cpu" and x.dtype not in HALF and not watched(x, self)

    def _picked(self, x: Tensor, select: Tensor, scores: Tensor | None) -> Tensor:
        """Each token on the neurons that it uses.

        Decoding is bound by memory and by the number of calls: a handful here, whatever the number
        of experts, and live rows are read where they lie.
        """
        mask, m = select != 0, self.hidden
        picked = LiveRows.of(x, mask, m)
        pairs = len(picked.rows) // m
        self.counter.seen(len(x), self.experts, pairs)
        sums = []
        for packed, bias in ((self.up, self.up_bias), (self.gate, self.gate_bias)):
            if packed is not None:
                dots = picked.dots(packed.flatten(0, 1))
                sums.append(dots if bias is None else dots.add_(bias.flatten()[picked.rows]))
        hidden, thin, live = self.activation(*sums).to(x.dtype), self._thin, None
        if thin is not None:
            hidden, live = thin.pick(hidden, picked.rows, len(x))
        if not self.router.unit_weights:
            hidden = (hidden.view(pairs, m) * select[mask].unsqueeze(1)).flatten()
        if thin is not None and live is not None:
            hidden, picked = hidden[live], picked.only(live)
            thin.counter.rows += len(hidden)
        y = picked.sums(hidden, self.down.flatten(0, 1), len(x))
        self.counter.rows += pairs
        if thin is not None and self.offset is not None:
            y = torch.addmm(y, select.to(y.dtype), self.offset)
        if self.down_bias is not None:
            y = y + self.down_bias
        if pairs < len(x) * self.experts:
            y = self.stood_in(self._modulated(y, select), mask, scores)
        return y

    def _modulated(self, y: Tensor, select: Tensor) -> Tensor:
        """What dead experts make of y (T, D), the live ones' sum with the bias: nothing here."""
        return y

    def neurons(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, N*m): every neuron of every expert, nothing routed."""
        return self._hidden(x, None, self.up, self.gate, self.up_bias, self.gate_bias)

    def add_stand_ins(self, active: float, dropped: Tensor, slopes: Tensor) -> None:
        """Put what dead experts add at one budget into the tables.

        Args:
            active: the budget, as this layer's router is set to it.
            dropped: (N, D); slopes: (R, D).
        """
        rows = {a: (self.dropped[i], self.slopes[i]) for i, a in enumerate(self.dropped_at)
                if self.dropped is not None and self.slopes is not None
                and abs(a - active) > 1e-3}  # fmt: skip
        rows[active] = (dropped.to(self.down.dtype), slopes.to(self.down.dtype))
        self.dropped_at = tuple(sorted(rows))
        self.dropped = as_parameter(torch.stack([rows[a][0] for a in self.dropped_at]))
        self.slopes = as_parameter(torch.stack([rows[a][1] for a in self.dropped_at]))

    def stood_in(self, y: Tensor, live: Tensor, scores: Tensor | None) -> Tensor:
        """y (T, D) with what stands in for the experts that are not ``live`` (T, N)."""
        for left, right in self._stand_ins(live, scores):
            y = torch.addmm(y, left.to(y.dtype), right.to(y.dtype))
        return y

    def _stand_ins(self, live: Tensor, scores: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Products (T, n) @ (n, D) that stand in for dead experts at the router's budget."""
        found, active = [], self.router.active
        if self.dropped is not None:
            found.append((~live, at_budget(self.dropped, self.dropped_at, active)))
        if self.slopes is not None and scores is not None:
            dead = scores.masked_fill(live[:, self.router.shared :], 0)
            found.append((dead, at_budget(self.slopes, self.dropped_at, active)))
        return found

    def _hidden(
        self,
        x: Tensor,
        weight: Tensor | None,
        up: Tensor,
        gate: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
    ) -> Tensor:
        """(n, D) -> (n, experts * m) neurons of a run of experts, times the experts' weights."""
        sums = [linear(x, up.flatten(0, 1), None if up_bias is None else up_bias.flatten())]
        if gate is not None:
            bias = None if gate_bias is None else gate_bias.flatten()
            sums.append(linear(x, gate.flatten(0, 1), bias))
        hidden = self.activation(*sums)
        return hidden if weight is None else weighted(hidden, weight, up.shape[1])

    # -- routing inside the experts

    @property
    def hosts(self) -> tuple[str, ...]:
        # down holds one run of memory per neuron; what up and gate read of an input feature is
        # strided. A whole layer's neurons (copies) are not the dense layer's, each once.
        own = type(self) is RoutedFFN and not self.copies and self.inside is None
        return ("down",) if own else ()

    def host(self, role: str, part: RoutedModule) -> None:
        if role not in self.hosts or not isinstance(part, LiveNeurons):
            name = type(part).__name__
            raise BadInput(f"a {name} cannot route {role} inside a {type(self).__name__}")
        self._put_inside(part)

    def _put_inside(self, part: LiveNeurons | None) -> None:
        if part is not None and (part.experts, part.size) != tuple(self.up.shape[:2]):
            raise BadInput(
                f"{part.experts} experts of {part.size} neurons are selected from, "
                f"the layer has {self.experts} of {self.hidden}"
            )
        offset = None if part is None else part.offsets(self.down)
        self.inside = part
        self.offset = None if offset is None else as_parameter(offset, self.down.requires_grad)

    @property
    def _thin(self) -> LiveNeurons | None:
        """What selects among neurons, where any may be dead or the routed path is asked for."""
        part = self.inside
        return part if part and (self.dispatch == "grouped" or not part.all_live) else None

    # -- weights, description, cost

    def dense_weights(self) -> dict[str, Tensor]:
        def unpack(packed: Tensor) -> Tensor:
            if self.copies:
                return packed[0]
            rows = packed.flatten(0, 1)
            return (
                rows
                if self.order is None
                else torch.empty_like(rows).index_copy_(0, self.order, rows)
            )

        with torch.no_grad():
            found = {"up": unpack(self.up), "down": unpack(self.down).t()}
            if self.gate is not None:
                found["gate"] = unpack(self.gate)
            if self.up_bias is not None:
                found["up_bias"] = unpack(self.up_bias)
            if self.gate_bias is not None:
                found["gate_bias"] = unpack(self.gate_bias)
            if self.down_bias is not None:
                found["down_bias"] = self.down_bias
        return found

    def options(self) -> dict[str, Any]:
        return options_of(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        tensors, rest = parts_of(options)
        return cls(*tensors, **rest)  # type: ignore[arg-type]

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        return cost_of(self, active)

    def extra_repr(self) -> str:
        kind = "copies" if self.copies else "experts"
        gated = ", gated" if self.gate is not None else ""
        return f"{self.experts} {kind} of {self.hidden} neurons, width={self.width}{gated}"
