"""Speed of a routed model beside the dense one and the ideal, in the regimes it is used in.

*decode*: one token for each of a few sequences, after a context that is in the key/value cache;
the caches are copied before every timed step, so all steps of a model see the same lengths.
*prefill*: one sequence at once, without a cache; all logits are computed. Models that do not
generate run their example at once.

**The ideal** is Amdahl's: of the dense model's time, the part that it spends in the projections
that were rewritten shrinks to the share that routing leaves of them, the rest stays. That part is
measured in the same rounds: the dense weights of all routed modules, multiplied one after the
other (``dense projections``). The share is of bytes in decode, of operations in prefill
(:func:`sparsify.costs.facts`, routers and stand-ins included), at the budget that the measured
tokens really used. In a batch of b, a weight is read where any sequence uses it: at a budget a,
``1 - (1 - a)^b`` of them, if tokens choose independently (tokens of one text choose more alike: the
ideal may then be exceeded). ``counted`` is the ratio of all bytes (or operations) instead, as if
nothing but those took time: what a model of long kernels would come near.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.bench_table import BenchRow, Regime
from sparsify.costs import facts
from sparsify.errors import BadInput
from sparsify.match import find
from sparsify.regions import Region
from sparsify.report import ModelFacts, Report
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import kept, set_active
from sparsify.runtime.model import SparseModel
from sparsify.runtime.spec import RoutedModule
from sparsify.timing import Rounds, Work, interleaved

DENSE, COMPILED = "dense", "torch.compile"
EAGER, LOWERED = "routed, eager", "routed, lowered"
DENSE_LOWERED = "dense, lowered"
PARTS = ("dense projections", "dense projections, lowered")
_SCORES = "attention scores"  # as sparsify.costs names them
STEPS = 8  # different tokens that one timed run decodes: a single one may be an odd one
Progress = Callable[[str, int, int], None]
Run = Callable[[], Any]


# ---------------------------------------------------------------------------- measuring


@dataclasses.dataclass
class Bench:
    """What is to be measured.

    Attributes:
        sparse: the routed model.
        dense: dense models by name (``DENSE``, ``COMPILED``), callable as the sparse one; may be
            empty: the base is then the routed model with everything live.
        call: (args, kwargs) of models that do not generate; None = the sparse model's example.
        ids: (many,) token ids to run causal models on.
        lower: whether to measure the lowered model too.
    """

    sparse: SparseModel
    dense: Mapping[str, Any]
    ids: Tensor
    call: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    lower: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)

    def rows(
        self,
        regimes: Sequence[Regime],
        budgets: Sequence[float],
        rounds: int,
        progress: Progress | None = None,
    ) -> Iterator[BenchRow]:
        """All rows, regime after regime; the dials and kernels are as before at the end."""
        eager = kernels_of(self.sparse)
        try:
            with torch.no_grad(), kept(self.sparse):
                _ = self._regions  # found by running the graph: before kernels are in place
                lowered = self._lowered(budgets, eager) if self.lower else {}
                for regime in regimes:
                    yield from self._regime(regime, budgets, lowered, rounds, progress)
        finally:
            put(eager)

    def _regime(
        self,
        regime: Regime,
        budgets: Sequence[float],
        lowered: Mapping[float, Kernels],
        rounds: int,
        progress: Progress | None,
    ) -> Iterator[BenchRow]:
        if COMPILED in self.dense:  # past its limit of shapes, dynamo would run eager, silently
            torch._dynamo.reset()
        work = {name: _work(self._steps(model, regime)) for name, model in self.dense.items()}
        settings: dict[str, tuple[str, float]] = {}
        none: Kernels = dict.fromkeys(kernels_of(self.sparse))
        steps = self._steps(self.sparse, regime)
        for name, ways in ((EAGER, dict.fromkeys(budgets, none)), (LOWERED, lowered)):
            for active, kernels in ways.items():
                key = f"{name} {active}"
                settings[key] = (name, active)
                work[key] = _work(steps, self._turn(active, kernels))
        tick = None
        if progress is not None:
            report = progress
            tick = lambda done, total: report(regime.name, done, total)  # noqa: E731
        products = {getattr(model, "product", None) for model in self.dense.values()} | {None}
        for product in products:
            work[PARTS[product is not None]] = Work(self._dense_projections(regime, product))
        found = interleaved(work, rounds, progress=tick)
        live = {key: self._realised(work[key]) for key in settings}
        yield from self._judged(regime, found, settings, live)

    def _judged(
        self,
        regime: Regime,
        found: Rounds,
        settings: Mapping[str, tuple[str, float]],
        live: Mapping[str, float | None],
    ) -> Iterator[BenchRow]:
        base = found.best(self.dense) if self.dense else f"{EAGER} {1.0}"
        part_of_base = PARTS[getattr(self.dense.get(base), "product", None) is not None]
        tokens = regime.batch * regime.tokens
        for key in found.seconds:
            name, active = settings.get(key, (key, None))
            seconds, speedup = found.time(key), found.speedup(key, base)
            ideal = counted = None
            if active is not None:
                part = min(found.time(part_of_base).median / found.time(base).median, 1.0)
                ideal, counted = self.ideal(regime, live.get(key) or active, part)
            note = "the part that routing may shrink" if key in PARTS else ""
            yield BenchRow(
                regime.name, tokens, name, active, live.get(key), seconds, speedup, ideal,
                key == base, note, counted,
            )  # fmt: skip

    # -- running

    def _steps(self, model: Any, regime: Regime) -> Steps:
        if isinstance(self.sparse.call_spec, CausalCall):
            # the context is no shape that compiling is to be spent on
            plain = self.dense.get(DENSE, model) if model is self.dense.get(COMPILED) else model
            return Steps(model, regime, self.ids, filler=plain)
        return Steps(model, regime, self.ids, self.call, self.sparse.example)

    def _turn(self, active: float, kernels: Kernels) -> Run:
        def turn() -> None:
            if self.sparse.active:
                set_active(self.sparse, active, warn=False)
            put(kernels)

        return turn

    def _realised(self, work: Work) -> float | None:
        if work.prepare is not None:
            work.prepare()
        reset(self.sparse)
        work.call()
        seen = [counter for _, counter in counters(self.sparse)]
        total = sum(counter.units_total for counter in seen)
        return sum(counter.units_live for counter in seen) / total if total else None

    def _lowered(self, budgets: Sequence[float], eager: Kernels) -> dict[float, Kernels]:
        """The kernels that codegen chooses at each budget; why some have none goes to the notes."""
        found: dict[float, Kernels] = {}
        budgets_of: dict[str, list[str]] = {}
        for active in budgets:
            self._turn(active, eager)()
            try:
                said = reasons(self.sparse.lower())
            except BadInput as error:  # no code generator in this installation
                self.notes.append(f"not lowered: {error.what}")
                return {}
            found[active] = kernels_of(self.sparse)
            count = sum(m.kernel is not None for m in found[active] if isinstance(m, RoutedModule))
            text = "; ".join([f"{count} routed modules run lowered", *said])
            budgets_of.setdefault(text, []).append(f"{active:.0%}")
        self.notes += [f"at {', '.join(at)} active, {text}" for text, at in budgets_of.items()]
        self.notes += tidied(self.sparse)
        return found

    # -- the ideal

    def ideal(self, regime: Regime, active: float, part: float) -> tuple[float, float]:
        """(Amdahl's speedup, dense over routed by bytes or operations alone).

        Args:
            part: of the dense model's time, what its routed projections take.
        """
        active = min(active, 1.0)
        read = 1 - (1 - active) ** regime.batch if regime.decodes else active
        causal = isinstance(self.sparse.call_spec, CausalCall)
        context = regime.batch * regime.context if regime.decodes else regime.tokens
        context = context // 2 if causal and not regime.decodes else context
        dense, routed = self._facts(1.0, context), self._facts(read, context)
        report = self.sparse.report
        if isinstance(report, Report) and not _alike(self._facts(1.0, report.context), report):
            # all live is not the dense model (copies, shared layers): take what was counted then
            dense, routed = report.dense, self._facts(read, report.context)
        if regime.decodes:
            before, after = dense.bytes_per_token, routed.bytes_per_token
            routable = sum(w.numel() * w.element_size() for w in self._projections)
        else:
            before, after = dense.flops_per_token, routed.flops_per_token
            routable = sum(2 * w.numel() for w in self._projections)
        saved = (before - after) / routable if routable else 0.0
        return 1 / (1 - part * min(saved, 1.0)), before / after

    @functools.cached_property
    def _projections(self) -> list[Tensor]:
        """(out, in) dense weights of all routed modules, those of one input one after another."""
        return [weight for group in self._groups for weight in group]

    @functools.cached_property
    def _groups(self) -> list[list[Tensor]]:
        """The same, by the input that they read: queries, keys and values; gate and up."""
        groups: dict[Any, list[Tensor]] = {}
        inputs = {
            str(n.target): n.args[0] for n in self.sparse.graph.graph.nodes if n.op == "call_module"
        }
        for path, module in self.sparse.graph.named_modules():
            if isinstance(module, RoutedModule):
                for weight in module.dense_weights().values():
                    if weight.dim() == 2:
                        key = inputs.get(path, path), weight.shape[1]
                        groups.setdefault(key, []).append(weight.detach().contiguous())
        return list(groups.values())

    def _dense_projections(self, regime: Regime, product: Any) -> Run:
        """The projections as the dense model computes them: torch's products one by one, or those
        of one input in one call of ``product`` (sparsify/runtime/beside.py)."""
        tokens = regime.batch * regime.tokens if not regime.own else 1
        inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]).to(w) for w in self._projections}
        work = [(inputs[group[0].shape[1]], group, [None] * len(group)) for group in self._groups]

        def run() -> None:
            for x, weights, biases in work:
                if product is None:
                    for weight in weights:
                        torch.nn.functional.linear(x, weight)
                elif len(weights) == 1:
                    product(x, weights[0])
                else:
                    product.several(x, weights, biases)

        return run

    def _facts(self, active: float, context: int) -> ModelFacts:
        if self.sparse.active:
            set_active(self.sparse, active, warn=False)
        found = facts(self.sparse.graph, self._regions, context=max(context, 1))
        flops, cache = self._unseen
        return dataclasses.replace(
            found,
            flops_per_token=found.flops_per_token + flops * max(context, 1),
            bytes_per_token=found.bytes_per_token + cache * max(context, 1),
        )

    @functools.cached_property
    def _unseen(self) -> tuple[float, float]:
        """Operations and cache bytes per key of dense attention between routed projections.

        The matcher no longer finds it there; the report counted it.
        """
        report, call = self.sparse.report, self.sparse.call_spec
        if not isinstance(report, Report):
            return 0.0, 0.0
        seen = facts(self.sparse.graph, self._regions, context=report.context)
        dense, left, now = (
            f.by_kind.get(_SCORES, 0.0) for f in (report.dense, report.sparse, seen)
        )
        missing = max(left - now, 0.0)
        if not missing:
            return 0.0, 0.0
        layers = call.layers if isinstance(call, CausalCall) else ()
        width = sum(heads * (key + value) for heads, key, value in layers)
        return missing / report.context, missing / dense * width * self.sparse.dtype.itemsize

    @functools.cached_property
    def _regions(self) -> tuple[Region, ...]:
        """What was left dense."""
        return tuple(find(self.sparse.graph, self.sparse.example).regions)


def _alike(found: ModelFacts, report: Report) -> bool:
    """Whether a graph with all live costs what the dense one did."""
    a, b = found.flops_per_token, report.dense.flops_per_token
    return abs(a - b) <= 1e-3 * b


class Steps:
    """One model in one regime: what a timed run calls, and the caches that it needs.

    Args:
        filler: what runs the context; default: ``model``.
    """

    def __init__(
        self,
        model: Any,
        regime: Regime,
        ids: Tensor,
        call: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
        example: Sequence[Tensor] = (),
        filler: Any = None,
    ) -> None:
        self.model, self.regime = model, regime
        self.filler = filler or model
        self.arguments, self.example = call, example
        self.count = STEPS if regime.decodes else 1
        length = regime.context + (self.count if regime.decodes else regime.tokens)
        self.ids = ids[: regime.batch * length].view(regime.batch, length) if not example else ids
        self.past: Any = None
        self.ready: list[Any] = []

    def prepare(self) -> None:
        """A cache for every step, and one step to wake threads and fetch code."""
        if not self.regime.decodes:
            return
        context = self.ids[:, : self.regime.context]
        if self.past is None:
            self.past = self.filler(input_ids=context, use_cache=True).past_key_values
        self.ready = [copy.deepcopy(self.past) for _ in range(self.count + 1)]
        self._decode(0)

    def run(self) -> None:
        """All steps."""
        if self.regime.decodes:
            for step in range(self.count):
                self._decode(step)
        elif not self.example:
            self.model(input_ids=self.ids, use_cache=False)
        elif self.arguments is not None:
            args, kwargs = self.arguments
            self.model(*args, **kwargs)
        else:
            self.model.graph(*self.example)

    def _decode(self, step: int) -> None:
        at = self.regime.context + step
        self.model(
            input_ids=self.ids[:, at : at + 1], past_key_values=self.ready.pop(), use_cache=True
        )


def _work(steps: Steps, turn: Run | None = None) -> Work:
    def prepare() -> None:
        if turn is not None:
            turn()
        steps.prepare()

    return Work(steps.run, prepare, units=steps.count)


# ---------------------------------------------------------------------------- kernels


Kernels = dict[RoutedModule | SparseModel, Any]


def kernels_of(model: torch.nn.Module) -> Kernels:
    """The kernel of every routed module, and of dense products; None where eager runs."""
    found: Kernels = {m: m.kernel for m in model.modules() if isinstance(m, RoutedModule)}
    return {**found, model: model.product} if isinstance(model, SparseModel) else found


def put(kernels: Kernels) -> None:
    """Put kernels (back) in place."""
    for module, kernel in kernels.items():
        setattr(module, "product" if isinstance(module, SparseModel) else "kernel", kernel)


def tidied(model: SparseModel) -> list[str]:
    """A note on what decoding leaves out of the model's graph; none where that is nothing."""
    done = model.tidied(tokens=1)
    if not done or model.device.type != "cpu":
        return []
    listed = ", ".join(f"{what} ({count})" for what, count in done.items())
    return [f"the graph was tidied for decoding: {listed}"]


def reasons(remarks: Any) -> list[str]:
    """What ``SparseModel.lower`` says, equal sentences once with their number."""
    said: dict[str, int] = {}
    for remark in remarks or ():
        text = str(getattr(remark, "reason", "") or remark)
        said[text] = said.get(text, 0) + 1
    return [f"{text} ({count} times)" if count > 1 else text for text, count in said.items()]
