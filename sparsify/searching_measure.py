"""How far a setting of the dials is from the dense model: KL on text, and the work really done.

The dense model is the routed one at its dense limit. Its log-probabilities are computed once and
kept (bounded, see ``BYTES``). A unit is measured by running the graph from its first node on
(:mod:`sparsify.replay`), everything before it as it was in a recorded run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from sparsify.costs import routed_cost
from sparsify.errors import BadInput
from sparsify.replay import Replay
from sparsify.runtime.cost import Cost
from sparsify.runtime.dial import set_each
from sparsify.runtime.model import SparseModel
from sparsify.runtime.spec import RoutedModule
from sparsify.searching_units import Setting, Unit, everything

BYTES = 2**29  # of the dense model's log-probabilities; fewer tokens are measured where they exceed
_POSITIONS = 64  # log-probabilities of this many positions at a time


@dataclasses.dataclass(frozen=True)
class Measured:
    """One setting on the text.

    Attributes:
        kl: mean KL(dense || routed), nats a token.
        error: its standard error over tokens, as if they were independent.
        nll: mean negative log-likelihood of the next token.
        cost: of all routed modules, by the units that were really live.
        tokens: predicted.
    """

    kl: float
    error: float
    nll: float
    cost: Cost
    tokens: int


class Measure:
    """Measures settings of one model on one text.

    Args:
        model: compiled, with all units' routers in it.
        units: what will be turned.
        batches: token ids (batch, token).
        context: keys per token that the attention cost counts.
    """

    def __init__(
        self, model: SparseModel, units: Sequence[Unit], batches: Sequence[Tensor], *, context: int
    ) -> None:
        self.model, self.units, self.context = model, list(units), context
        self.gm = model.graph
        self.routers = everything(units)
        self.counted = [m for m in self.gm.modules() if isinstance(m, RoutedModule)]
        self.nodes = [n for n in self.gm.graph.nodes if n.op == "call_module"]
        starts = [unit.start for unit in units]
        self.ids = list(batches)
        self.runs = [
            Replay(self.gm, model.call_spec.flatten((), {"input_ids": ids}), starts)
            for ids in self.ids
        ]
        self.live: dict[RoutedModule, float] = {}
        self.setting: Setting = {}
        self.teacher: list[Tensor] = []
        self.dense = self.record(dict.fromkeys(self.routers, 1.0))

    def record(self, setting: Setting) -> Measured:
        """Measure a setting of all routers, and start from it from now on."""
        set_each(self.gm, setting)
        self._reset()
        found = []
        for number, (run, ids) in enumerate(zip(self.runs, self.ids, strict=True)):
            logits = run.record()
            if number == len(self.teacher):
                self.teacher.append(logits.detach().float().log_softmax(-1))
            found.append(divergence(logits, self.teacher[number], ids))
        self.live = self._live()
        self.setting = dict(setting)
        return self._sum(found, self.live)

    def full(self, setting: Setting) -> Measured:
        """Measure a setting; what is started from stays."""
        set_each(self.gm, setting)
        return self._run(None, {})

    def changed(self, unit: Unit, setting: Setting) -> Measured:
        """Measure the recorded setting with one unit turned otherwise.

        What routers know of the other passes' budgets stays as recorded too (it changes little
        with one unit of many, and would change what came before this unit).
        """
        if any((r.active, r.k_exact) != (a, None) for r, a in self.setting.items()):
            set_each(self.gm, self.setting)
        for router, active in setting.items():
            router.set_active(active, warn=False)
        found = self._run(unit.start, self.live)
        for router in setting:
            router.set_active(self.setting[router], warn=False)
        return found

    # -- parts

    def _run(self, start: fx.Node | None, live: dict[RoutedModule, float]) -> Measured:
        """The text from a node on, or all of it; ``live`` of what does not run."""
        self._reset()
        found = []
        for run, ids, teacher in zip(self.runs, self.ids, self.teacher, strict=True):
            found.append(divergence(run.run(start or run.nodes[0]), teacher, ids))
        return self._sum(found, {**live, **self._live()})

    def _reset(self) -> None:
        for module in self.counted:
            module.counter.reset()

    def _live(self) -> dict[RoutedModule, float]:
        """Module -> share of its units that were live, where it ran."""
        return {
            m: m.counter.live_fraction
            for m in self.counted
            if getattr(type(m), "counts", True) and m.counter.units_total
        }

    def _sum(
        self, found: Sequence[tuple[Tensor, float]], live: dict[RoutedModule, float]
    ) -> Measured:
        kl = torch.cat([values for values, _ in found])
        count = len(kl)
        return Measured(
            max(float(kl.mean()), 0.0),
            float(kl.std()) / math.sqrt(count) if count > 1 else 0.0,
            sum(nll for _, nll in found) / count,
            routed_cost(self.gm, self.nodes, context=self.context, live=live),
            count,
        )


def divergence(logits: Tensor, reference: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """(KL(reference || model) of every predicted token, float64; summed -log likelihood).

    Args:
        logits: (batch, token, vocabulary) of the model.
        reference: (batch, token, vocabulary) log-probabilities.
        ids: (batch, token).
    """
    found, nll = [], 0.0
    logits, reference = logits.detach(), reference.detach()
    target = ids[:, 1:]
    for start in range(0, target.shape[1], _POSITIONS):
        part = slice(start, min(start + _POSITIONS, target.shape[1]))
        mine = logits[:, part].float().log_softmax(-1)
        theirs = reference[:, part]
        found.append((theirs.exp() * (theirs - mine)).nansum(-1, dtype=torch.float64).flatten())
        nll -= float(mine.gather(-1, target[:, part].unsqueeze(-1)).double().sum())
    return torch.cat(found), nll


def sample(
    batches: Sequence[Tensor], fitted: int, tokens: int, vocabulary: int
) -> tuple[list[Tensor], str]:
    """The blocks to measure on, and a note: beyond the tokens that routers were fitted on if any.

    Args:
        batches: the text; the first ``fitted`` tokens fitted the routers.
        tokens: wanted; fewer where the dense model's log-probabilities would not fit.

    Raises:
        BadInput: nothing to predict.
    """
    most = max(BYTES // (4 * vocabulary), 2)
    rows = [row for batch in batches for row in batch.split(1) if row.shape[1] > 1]
    if not rows:
        raise BadInput("the text is too short to search on", help="give more calibration text")
    fresh, seen = [], 0
    for row in rows:
        seen += row.numel()
        if seen > fitted:
            fresh.append(row)
    note = ""
    if tokens > most:
        note = (
            f"measured on {most} tokens: the log-probabilities of more need over {BYTES >> 20} MB"
        )
    if sum(row.numel() for row in fresh) < min(tokens, most):
        fresh = rows
        note = "the text is short: it is measured on what the routers were fitted on"
    length = min(tokens, most, fresh[0].shape[1])
    chosen: list[Tensor] = []
    for row in fresh:
        if chosen and sum(c.numel() for c in chosen) + length > min(tokens, most):
            break
        if row.shape[1] >= length:
            chosen.append(row[:, :length])
    return list(torch.cat(chosen).split(4)), note
