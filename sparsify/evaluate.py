"""Quality: perplexity, divergence from the dense model, and static pruning at the same budget.

Everything is streamed block by block: one block's logits of two models are in memory, and their
log-probabilities only for a few positions at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput
from sparsify.report import Quality, QualityRow, Routing, RoutingRow
from sparsify.runtime import metrics
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import kept, routers, set_active
from sparsify.runtime.router import Router
from sparsify.static_layers import LayerPlan, layer_plans, layers_of, rank_layers
from sparsify.static_pruning import Plan, all_live, plan, prunable, rank, weighted

Run = Callable[[Tensor], Any]  # token ids (batch, token) -> logits, or an output that has them
Progress = Callable[[str, int, int], None]
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
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agree: int = 0

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
        for start in range(0, target.shape[1], _POSITIONS):
            part = slice(start, start + _POSITIONS)
            mine = predicted[:, part].float().log_softmax(-1)
            theirs = reference[:, part]
            wanted = target[:, part]
            self.nll -= float(mine.gather(-1, wanted.unsqueeze(-1)).double().sum())
            self.kl += float((theirs.exp() * (theirs - mine)).nansum(dtype=torch.float64))
            self.agree += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            self.tokens += wanted.numel()


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
    progress: Progress | None = None,
) -> Quality:
    """The routed model at several budgets, beside the dense model and static pruning.

    Static pruning drops as much as the routed model really did on this text; of several ways to
    rank units and to share the budget among layers, the best on this very text is reported, which
    favours the baseline.

    Args:
        model: with routed modules; its budgets are as before after it.
        batches: token ids of the text.
        text: its name.
        active: budgets.
        calibration: token ids that static pruning ranks units on; without them it is left out.
        run: how to call the model on ids; default ``model(ids)``.
        pass_name: turn and count only what this pass made; the rest is all live.
        progress: called with ("evaluate", rows done, rows).
    """
    call: Run = run or model
    batches = list(batches)
    total = sum(len(batch) for batch in batches)
    passes = 1 + bool(calibration)
    with kept(model), _eval_mode(model):
        runs = {f"routed {a}": _at(model, call, a, pass_name) for a in active}
        live: dict[float, dict[str, float]] = {}
        scores = {}

        def report(offset: int) -> Callable[[int], None] | None:
            if progress is None:
                return None
            return lambda done: progress("evaluate", offset + done, passes * total)

        watched = {n: _counting(model, r, live.setdefault(a, {}), pass_name) for (n, r), a in
                   zip(runs.items(), active, strict=True)}  # fmt: skip
        scores = compare(dense_run(model, call), watched, batches, progress=report(0))
        plans = _plans(model, call, calibration, {a: _mean(live[a]) for a in active if a < 1})
        statics = {name: pruned_run(model, call, p) for name, (_, p) in plans.items()}
        if statics:
            found = compare(dense_run(model, call), statics, batches, progress=report(total))
            scores |= {name: found[name] for name in statics}
    dense = scores["dense"]
    rows = [QualityRow("dense", 1.0, None, dense.perplexity, 1.0, 0.0, 1.0)]
    for a in active:
        fractions = _mean(live[a])
        realised = weighted(fractions, _weights(model)) if fractions else None
        score = scores[f"routed {a}"]
        rows.append(_row("routed", a, realised, score, dense))
        tried = [(scores[n], p) for n, (budget, p) in plans.items() if budget == a]
        if tried:
            best, chosen = min(tried, key=lambda item: item[0].perplexity)
            rows.append(_row("static pruning", a, chosen.active, best, dense, chosen.note))
    return Quality(text, dense.tokens, tuple(rows))


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
    with kept(model), _eval_mode(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for path, router in found:
            hooks.callback(watch(path, router).remove)
        at = _at(model, call, active, pass_name)
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


def _row(
    model: Any, active: float, realised: float | None, score: Score, dense: Score, note: str = ""
) -> QualityRow:
    ratio = score.perplexity / dense.perplexity
    return QualityRow(
        model, active, realised, score.perplexity, ratio, score.mean_kl, score.top1, note
    )


def _plans(
    model: nn.Module, call: Run, calibration: Sequence[Tensor], live: Mapping[float, Any]
) -> dict[str, tuple[float, Plan | LayerPlan]]:
    """Name -> (budget, plan): the ways to prune that are tried at each budget."""
    found: dict[str, tuple[float, Plan | LayerPlan]] = {}
    whole = {p for p in layers_of(model) if any(p in f for f in live.values())}
    if calibration and whole:
        ranking = rank_layers(model, call, calibration)
        for active, fractions in live.items():
            share = [f for p, f in fractions.items() if p in whole]
            for way in layer_plans(ranking, sum(share) / len(share)):
                found[f"static {active} {way.note}"] = (active, way)
        return found
    if not calibration or not live or not prunable(model):
        return {}
    rankings = rank(model, call, calibration)
    found_units, weights = prunable(model), _weights(model)
    for active, fractions in live.items():
        layers = {p: f for p, f in fractions.items() if p in rankings}
        if not layers:
            continue
        even = dict.fromkeys(layers, 0.0)
        for kind in {type(u) for u in found_units.values()}:
            same = {p: layers[p] for p in layers if type(found_units[p]) is kind}
            even |= dict.fromkeys(same, weighted(same, weights) if same else 0.0)
        ranked = "ranked by variance, mean added back"
        ways = [(ranked, even, False), (f"{ranked}, budgets of the routed layers", layers, False)]
        if any(rankings[p].refit is not None for p in layers):
            refit = "ranked by variance, what stays refitted by least squares"
            ways += [(refit, even, True), (f"{refit}, budgets of the routed layers", layers, True)]
        for note, budget, again in ways:
            chosen = plan(
                rankings, budget, compensate=True, note=note, refit=again, weights=weights
            )
            found[f"static {active} {note}"] = (active, chosen)
    return found


def _weights(model: nn.Module) -> dict[str, float]:
    """Path -> what a module weighs in a mean over modules: the mean of each kind is one."""
    units = prunable(model)
    means: dict[type[Any], float] = {}
    for kind in {type(u) for u in units.values()}:
        same = [u.weight for u in units.values() if type(u) is kind]
        means[kind] = sum(same) / len(same)
    return {path: u.weight / means[type(u)] for path, u in units.items()}


def dense_run(model: nn.Module, call: Run) -> Run:
    """The routed model with everything live."""

    def run(ids: Tensor) -> Any:
        with all_live(model):
            return call(ids)

    return run


def _at(model: nn.Module, call: Run, active: float, pass_name: str | None = None) -> Run:
    """The model at a budget; routers are set only when they stand elsewhere."""
    routers = [m for m in model.modules() if isinstance(m, Budgeted)]
    state: list[tuple[float, int | None, float]] = []

    def run(ids: Tensor) -> Any:
        if not routers:
            return call(ids)
        if not state:
            if pass_name is not None:
                set_active(model, 1.0)
            set_active(model, active, pass_name=pass_name)
            state.extend(r.setting for r in routers)
        for router, setting in zip(routers, state, strict=True):
            if router.setting != setting:
                router.setting = setting
        return call(ids)

    return run


def pruned_run(model: nn.Module, call: Run, chosen: Plan | LayerPlan) -> Run:
    """The routed model's dense model without what the plan drops."""

    def run(ids: Tensor) -> Any:
        with chosen.applied(model):
            return call(ids)

    return run


def _counting(
    model: nn.Module, run: Run, sums: dict[str, Any], pass_name: str | None = None
) -> Run:
    """Adds live and all units of every prunable module to ``sums``."""
    whole: Mapping[str, Any] = layers_of(model)
    units = {p: u.module for p, u in prunable(model).items()}
    mine = [
        {p for p, m in kind.items() if pass_name in (None, m.pass_name)} for kind in (whole, units)
    ]
    paths = mine[0] or mine[1]

    def counted(ids: Tensor) -> Any:
        reset(model)
        output = run(ids)
        for path, counter in counters(model):
            if path in paths:
                live, units = sums.get(path, (0, 0))
                sums[path] = (live + counter.units_live, units + counter.units_total)
        return output

    return counted


def _mean(sums: Mapping[str, Any]) -> dict[str, float]:
    return {path: live / units for path, (live, units) in sums.items() if units}


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
