"""Quality on text: perplexity and divergence from the dense model, beside the baselines.

Everything is streamed block by block: one block's logits of two models are in memory, and their
log-probabilities only for a few positions at a time. Of every sequence four sums are kept, for the
intervals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify import contenders, contest
from sparsify.bootstrap import RESAMPLES, Bootstrap, Numbers
from sparsify.contenders import BASELINES, Contender, dense_run, pruned_run
from sparsify.contest import Progress, evaluating
from sparsify.errors import BadInput
from sparsify.report import Interval, Quality, QualityRow, Routing, RoutingRow
from sparsify.runtime import metrics
from sparsify.runtime.dial import kept, routers
from sparsify.runtime.router import Router

__all__ = [
    "ROUTED_TOKENS", "Score", "compare", "dense_run", "evaluating", "logits_of", "perplexity",
    "pruned_run", "quality", "routing",
]  # fmt: skip

Run = Callable[[Tensor], Any]  # token ids (batch, token) -> logits, or an output that has them
ROUTED_TOKENS = 4096  # that routing is measured on: the cache is followed token by token
_POSITIONS = 64  # log-probabilities of this many positions at a time


@dataclasses.dataclass
class Score:
    """Sums over the predicted tokens of a text.

    Attributes:
        tokens: predicted tokens.
        nll: sum of negative log-likelihoods, nats.
        kl: sum of KL(dense || model), nats.
        agree: tokens where both models' most likely next token is the same.
        rows: the same four numbers of every block.
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0
    rows: list[tuple[float, float, float, float]] = dataclasses.field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; infinite where it overflows."""
        mean = self.nll / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def mean_kl(self) -> float:
        """Nats a token, never negative."""
        return max(self.kl / max(self.tokens, 1), 0.0)

    @property
    def top1(self) -> float:
        """Fraction of tokens with the dense model's most likely next token."""
        return self.agree / max(self.tokens, 1)

    def add(self, logits: Tensor, reference: Tensor, ids: Tensor) -> None:
        """Score one block.

        Args:
            logits: (batch, token, vocabulary) of this model.
            reference: (batch, token, vocabulary) log-probabilities of the dense model.
            ids: (batch, token).
        """
        predicted, reference, target = logits[:, :-1], reference[:, :-1], ids[:, 1:]
        before = (self.tokens, self.nll, self.kl, self.agree)
        for start in range(0, target.shape[1], _POSITIONS):
            part = slice(start, start + _POSITIONS)
            mine = predicted[:, part].float().log_softmax(-1)
            theirs = reference[:, part]
            wanted = target[:, part]
            self.nll -= float(mine.gather(-1, wanted.unsqueeze(-1)).double().sum())
            self.kl += float((theirs.exp() * (theirs - mine)).nansum(dtype=torch.float64))
            self.agree += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            self.tokens += wanted.numel()
        after = (self.tokens, self.nll, self.kl, self.agree)
        row = [float(b - a) for a, b in zip(before, after, strict=True)]
        self.rows.append((row[0], row[1], row[2], row[3]))


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]`` or the first item."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits")
    else:
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Sequence) and output:
            found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise BadInput(
            "the model gives no logits (batch, token, vocabulary)",
            why=f"its output is a {type(output).__name__}",
            help="perplexity is defined for language models only",
        )
    return found


def compare(
    dense: Run,
    others: Mapping[str, Run],
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Scores of ``dense`` (under that name) and of the others, in one run over the text.

    Args:
        dense: the reference.
        others: name -> model.
        batches: token ids (batch, token), at least two tokens long; every row is taken by itself.
        progress: called with the rows done.

    Raises:
        BadInput: there is nothing to predict, or an output without logits.
    """
    scores = {name: Score() for name in ("dense", *others)}
    done = 0
    with torch.no_grad():
        for batch in batches:
            for ids in batch.split(1):
                logits = logits_of(dense(ids))
                reference = logits.float().log_softmax(-1)
                scores["dense"].add(logits, reference, ids)
                for name, run in others.items():
                    scores[name].add(logits_of(run(ids)), reference, ids)
                done += 1
                if progress is not None:
                    progress(done)
    if not scores["dense"].tokens:
        raise BadInput("the text is too short to measure on", help="give more text")
    return scores


def perplexity(run: Run, batches: Iterable[Tensor]) -> float:
    """Of one model."""
    return compare(run, {}, batches)["dense"].perplexity


# ---------------------------------------------------------------------------- routed models


def quality(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    text: str,
    active: Sequence[float] = (1.0, 0.75, 0.5),
    calibration: Sequence[Tensor] = (),
    run: Run | None = None,
    pass_name: str | None = None,
    baselines: Sequence[str] = BASELINES,
    texts: Sequence[int] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """The routed model at several budgets, beside the dense model and the baselines.

    Static pruning drops as much as the routed model really did on this text; of several ways to
    rank units and to share the budget among layers, the best on the first tokens of this very text
    (:data:`contenders.PROBE`) is reported, which favours the baseline. TEAL does as many operations
    as the routed model was counted to do.

    Args:
        model: with routed modules; its budgets are as before after it.
        batches: token ids of the text.
        text: its name.
        active: budgets.
        calibration: token ids that baselines are fitted on; without them there are none.
        run: how to call the model on ids; default ``model(ids)``.
        pass_name: turn and count only what this pass made; the rest is all live.
        baselines: ``static``, ``teal`` or both.
        texts: of every row, the text that it is from: what is resampled; default: every row.
        resamples, seed: of the intervals; fewer than two make none.
        progress: called with ("evaluate", rows done, rows).
    """
    batches = list(batches)
    total = sum(len(batch) for batch in batches)
    held = contest.hold(
        model, run or model, batches, _measure, lambda score: score.perplexity, active=active,
        calibration=calibration, pass_name=pass_name, baselines=baselines,
        few=contenders.first_tokens(batches), total=total, progress=progress,
    )  # fmt: skip
    drawn = Bootstrap(
        texts or range(total), unit="texts" if texts else "sequences", resamples=resamples,
        seed=seed,
    )  # fmt: skip
    dense = held.results["dense"]
    table = _Table(held.results, drawn)
    rows = [QualityRow("dense", 1.0, None, dense.perplexity, 1.0, 0.0, 1.0)]
    for a in active:
        rows += [table.row(c) for c in held.at(a)]
    return Quality(text, dense.tokens, tuple(rows), drawn.facts)


def _measure(
    reference: Run,
    others: Mapping[str, Run],
    items: Sequence[Tensor],
    progress: Callable[[int], None] | None,
) -> dict[str, Score]:
    return compare(reference, others, items, progress=progress)


class _Table:
    """Rows with intervals from scores."""

    def __init__(self, scores: Mapping[str, Score], drawn: Bootstrap) -> None:
        self.scores, self.drawn = scores, drawn
        self.dense = scores["dense"]
        self._sums: dict[str, Numbers] = {}

    def row(self, who: Contender) -> QualityRow:
        score = self.scores[who.name]
        ratio = score.perplexity / self.dense.perplexity
        row = QualityRow(
            who.who, who.active, who.realised(), score.perplexity, ratio, score.mean_kl,
            score.top1, who.note, who.flops(),
        )  # fmt: skip
        if not self.drawn.possible:
            return row
        mine = self._resampled(who.name)
        routed = f"routed {who.active:g} "
        return dataclasses.replace(
            row,
            ratio_within=self._ratio(who.name, "dense"),
            kl_within=self.drawn.within(mine[:, 2] / mine[:, 0]),
            top1_within=self.drawn.within(mine[:, 3] / mine[:, 0]),
            to_routed=None if who.who == "routed" else self._ratio(who.name, routed),
        )

    def _ratio(self, name: str, other: str) -> Interval | None:
        """Of two perplexities, on the same resamples."""
        a, b = self._resampled(name), self._resampled(other)
        with np.errstate(over="ignore"):
            return self.drawn.within(np.exp((a[:, 1] - b[:, 1]) / a[:, 0]))

    def _resampled(self, name: str) -> Numbers:
        if name not in self._sums:
            self._sums[name] = self.drawn.sums(self.scores[name].rows)
        return self._sums[name]


def routing(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    text: str,
    active: float,
    run: Run | None = None,
    pass_name: str | None = None,
    tokens: int = ROUTED_TOKENS,
    segment: int = metrics.SEGMENT,
    cache: float = metrics.CACHE,
) -> Routing | None:
    """What every router does on a text at one budget; None where the model has no router.

    Args:
        model, batches, text, run, pass_name: as :func:`quality` takes them.
        tokens: at most; the rest of the text is left out.
        segment, cache: of :func:`sparsify.runtime.metrics.facts`.
    """
    call: Run = run or model
    found = [(p, r) for p, r in routers(model, None, pass_name) if isinstance(r, Router)]
    found = [(p, r) for p, r in found if r.routed]
    if not found:
        return None
    masks: dict[str, list[Tensor]] = {path: [] for path, _ in found}

    def watch(path: str, router: Router) -> Any:
        def keep(module: nn.Module, inputs: Any, select: Tensor) -> None:
            flat = select.detach().reshape(-1, router.units)  # one sequence at a time
            masks[path].append((flat[:, numbers[path]] != 0).cpu())

        return router.register_forward_hook(keep)

    numbers = {path: _numbers(router) for path, router in found}
    seen = 0
    with kept(model), evaluating(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for path, router in found:
            hooks.callback(watch(path, router).remove)
        at = contenders.at_budget(model, call, active, pass_name)
        for ids in (row for batch in batches for row in batch.split(1)):
            if seen >= tokens:
                break
            at(ids)
            seen += ids.numel()
        rows = [
            _routing_row(p, r, numbers[p], metrics.facts(masks[p], segment=segment, cache=cache))
            for p, r in found
            if masks[p]
        ]
    return Routing(text, seen, active, segment, cache, tuple(rows)) if rows else None


def _numbers(router: Router) -> list[int]:
    """The routed units as the routed module numbers them, ascending."""
    order = range(router.units) if router.order is None else router.order.tolist()
    return sorted(list(order)[router.shared :])


def _routing_row(
    path: str, router: Router, numbers: Sequence[int], facts: metrics.RouterFacts
) -> RoutingRow:
    return RoutingRow(
        path, str(router.selector), router.units, router.shared, router.active, facts.live_ratio,
        tuple(numbers), facts.live, facts.entropy, facts.imbalance, facts.srp, facts.size,
        facts.sch,
    )  # fmt: skip
