"""heal: train a routed model until it is near the dense one again, for minutes, not days.

The dense model teaches the routed one (:mod:`sparsify.healing_loss`) on a little text. What trains:

* ``routers``: routers and what stands in for dead units. The dense limit stays what it was.
* ``lora``: those, and a low-rank change of the routed modules' weights, merged in at the end.
* ``routed``: stand-ins and the routed modules' weights themselves: per minute the most is gained
  where stand-ins are few numbers (``hidden-route``), see ``RATES``.
* ``all``: every weight. For these two the teacher is a frozen copy of the model (memory for two).

Budgets hold meanwhile (:class:`sparsify.runtime.training.Thresholds`) and thresholds are fitted
anew at the end. With a schedule the model starts denser and is turned down over the first steps. A
tenth of the text is kept for measuring: the best step by mean KL wins, and a model that did not get
better is left as it was, and that is said.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput, SparsifyError
from sparsify.evaluate import compare
from sparsify.healing_loss import Distiller
from sparsify.healing_options import (
    check_checkpoint,
    check_options,
    check_schedule,
    rows_of,
    schedule_of,
)
from sparsify.healing_result import Healing, Row
from sparsify.healing_state import WHOLE, Progressed, Train, Trainee, read, write
from sparsify.report import Report
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import kept, routers, set_active
from sparsify.runtime.metrics import Loads
from sparsify.runtime.model import SparseModel
from sparsify.runtime.schedule import Shape
from sparsify.runtime.training import Thresholds, masked, resettle
from sparsify.saved import budget, load
from sparsify.static_pruning import all_live

Progress = Callable[[str, int, int], None]
# AdamW steps are about the learning rate in every coordinate: per kind of parameter. Stand-ins of
# all dead units add up and have the same gradient, so theirs is small. SmolLM2, KL of steps 7-11 on
# the same batches: untrained 0.516; routers and stand-ins at 1e-3 0.504; stand-ins at 1e-4 0.450,
# at 3e-5 0.466; stand-ins at 1e-4 and routers at 4e-3 0.434. Whole runs end alike: perplexity 21.16
# at 50.0% live after 64 steps with 1e-3 for both, 21.26 at 50.2% after 100 steps with these.
# Weights of routed modules alone (hidden-route, batches of 512 tokens): 1e-4 and 3e-4 were alike in
# four steps; 120 steps with these close 69 % of the gap on text that was not trained on.
RATES = {
    "routers": 4e-3, "stand-ins": 1e-4, "centres": 2e-4, "lora": 1e-3, "routed": 2e-4,
    "weights": 2e-5,
}  # fmt: skip
SETTLED = 2048  # tokens that thresholds are fitted on at the end
WARMUP = 5  # steps


def heal(
    model: SparseModel | str | Path,
    text: str | Path | Sequence[str] | Iterable[Tensor],
    *,
    train: Train = "lora",
    active: float | None = None,
    steps: int = 100,
    minutes: float | None = None,
    batch: int = 2,
    length: int = 256,
    rate: float = 1.0,
    rank: int = 8,
    half: bool = False,
    shards: int = 0,
    kl: float = 1.0,
    mse: float = 1.0,
    ce: float = 0.0,
    schedule: Shape | None = None,
    start: float = 1.0,
    ramp: float = 0.5,
    every: int = 20,
    patience: int = 3,
    seed: int = 0,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Healing:
    """Distil the dense model into the routed one, in place.

    Args:
        model: a routed causal language model, or the folder of one.
        text: ``docstrings``, ``licences`` (their calibration half), a file, texts, or batches of
            token ids (batch, token).
        train: ``routers``, ``lora``, ``routed`` or ``all``.
        active: budget to heal at; default: what the model is set to.
        steps: of AdamW, with warmup and cosine decay.
        minutes: of wall time; the decay then follows whichever of the two ends first.
        batch: sequences per step; length: tokens of each.
        rate: factor on the learning rates of ``RATES``.
        rank: of LoRA.
        half: train under autocast to bfloat16, two to four times as fast where the processor
            multiplies it (AVX-512 BF16, GPUs). Weights, optimizer and what is measured (and the
            thresholds of the end) are in the model's own precision all the same.
        shards: above 0, LoRA's factors are put together from shards, this many a vector, of pools
            that the weights share (:mod:`sparsify.runtime.shards`); as many numbers train.
        kl, mse, ce: how much each part of the loss counts.
        schedule: ``linear``, ``cosine`` or ``cubic``: how budgets go down from ``start`` to what is
            healed at, over the first ``ramp`` of the steps (:mod:`sparsify.runtime.schedule`).
            None: at the budget to heal at from the first step on.
        start: budget of the first step; routers that are to be denser than that stay as they are.
        ramp: 0 < ramp <= 1.
        every: steps between evaluations (and checkpoints); evaluations are at the budget healed at.
        patience: evaluations without improvement, after the ramp, before it stops; 0 = never.
        seed: of the order of the text and of the adapters.
        tokenizer: default: the model's.
        checkpoint: folder for checkpoints; removed at the end. None = none are written.
        resume: go on from the newest checkpoint there; with ``minutes`` unset the result is that
            of an uninterrupted run.
        progress: called with ("heal", steps done, steps) and ("evaluate", rows done, rows).

    Returns:
        A :class:`Healing`; weights that are shared with a dense model are not changed there.

    Raises:
        BadInput: no language model, no routed modules, not enough text, a bad option, or a loss
            that is not finite; the model is as it was then.
        OutputError: ``checkpoint`` holds an unfinished healing and ``resume`` is not given.
        BadCheckpoint: nothing to resume, or a checkpoint of another healing.
    """
    check_options(train, steps, minutes, batch, length, rate, rank, (kl, mse, ce), every)
    check_schedule(schedule, start, ramp)
    folder = None if checkpoint is None else Path(checkpoint)
    check_checkpoint(folder, resume)
    sparse = model if isinstance(model, SparseModel) else load(model)
    if sparse.kind != "causal-lm":
        raise BadInput("only causal language models can be healed", help=f"this is a {sparse.kind}")
    name, rows, measured = rows_of(sparse, text, tokenizer, batch, length, steps, seed)
    plan = {
        "train": train, "active": active, "steps": steps, "batch": batch, "length": length,
        "rate": rate, "rank": rank, "kl": kl, "mse": mse, "ce": ce, "every": every,
        "schedule": schedule, "start": start, "ramp": ramp, "shards": shards, "half": half,
        "seed": seed, "text": name, "tokens": rows.numel(), "sum": int(rows.sum()),
        "pipeline": sparse.pipeline,
    }  # fmt: skip
    before = [(r, r.setting) for _, r in routers(sparse)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        if active is not None:
            set_active(sparse, active)
        training = [m for m in sparse.modules() if m.training]
        sparse.eval()
        teacher = _frozen(sparse) if train in WHOLE else None
        trainee = Trainee.of(sparse, train, rank=rank, seed=seed, pieces=shards)
        stack.callback(trainee.unfreeze)
        stack.callback(lambda: [m.train() for m in training])
        run = _Run(
            sparse, trainee, Distiller(sparse, kl, mse, ce, teacher, half), plan, rows, measured,
            minutes=minutes, patience=patience, folder=folder, progress=progress,
        )  # fmt: skip
        try:
            found = run.all(resume)
        except BaseException:
            trainee.undo()
            _turn(before)
            raise
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


Settings = list[tuple[Budgeted, tuple[float, int | None, float]]]


def _turn(settings: Settings) -> None:
    for router, setting in settings:
        router.setting = setting


class _Run:
    """One healing: steps, evaluations, checkpoints, and the end."""

    def __init__(
        self,
        model: SparseModel,
        trainee: Trainee,
        distiller: Distiller,
        plan: dict[str, Any],
        rows: Tensor,
        measured: Tensor,
        *,
        minutes: float | None,
        patience: int,
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.trainee, self.distiller = model, trainee, distiller
        self.plan, self.rows, self.measured = plan, rows, measured
        self.minutes, self.patience, self.folder = minutes, patience, folder
        self.progress = progress or (lambda event, done, total: None)
        self.steps = int(plan["steps"])
        self.active = budget(model)
        self.settings: Settings = [(r, r.setting) for _, r in routers(model)]
        self.schedule = schedule_of(plan, self.active)
        groups = [
            {"params": list(group.values()), "lr": 0.0, "top": RATES[kind] * plan["rate"]}
            for kind, group in trainee.groups.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.thresholds = Thresholds(model)
        self.done = Progressed()
        self.clock = (time.perf_counter(), time.process_time())

    def all(self, resume: bool) -> Healing:
        """From the start, or from a checkpoint, to the end."""
        done = self.done
        with self.thresholds, masked(self.model):
            if resume and self.folder is not None:
                self.done = done = read(
                    self.folder, self.plan, self.trainee, self.optimizer, self.thresholds
                )
            else:
                self._evaluated()
            stopped = ""
            while not (stopped := self._ended()):
                self._step()
                if done.step % int(self.plan["every"]) == 0 or self._ended():
                    self._evaluated()
                    self._save()
        return self._finish(stopped)

    # -- one step

    def _step(self) -> None:
        done = self.done
        self._ramp()
        factor = self._factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["top"] * factor
        reset(self.model)
        loss, parts = self.distiller(input_ids=self._batch(done.step))
        if not torch.isfinite(loss):
            raise _diverged(done.step)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.trainee.parameters.values()), 1.0)
        if not torch.isfinite(norm):
            raise _diverged(done.step)
        self.optimizer.step()
        done.step += 1
        self._time()
        done.steps.append(
            {"step": done.step, "loss": float(loss.detach()), **parts, "gradient": float(norm),
             "factor": factor, "active": budget(self.model), "cpu_seconds": done.cpu_seconds}
        )  # fmt: skip
        self.progress("heal", done.step, self.steps)

    def _ramp(self) -> None:
        """Turn every router to its part of the way down; at the end exactly to its setting."""
        if self.schedule is None:
            return
        left = self.schedule.left(self._gone() * self.steps)
        _turn(self.settings)
        for router, (active, *_) in self.settings if left else ():
            if active < self.schedule.start:
                router.set_active(active + (self.schedule.start - active) * left, warn=False)

    def _batch(self, step: int) -> Tensor:
        """The sequences of a step: every epoch in an order of its own."""
        size, count = int(self.plan["batch"]), len(self.rows)
        chosen = []
        for number in range(step * size, (step + 1) * size):
            epoch, place = divmod(number, count)
            generator = torch.Generator().manual_seed(int(self.plan["seed"]) * 1_000_003 + epoch)
            chosen.append(int(torch.randperm(count, generator=generator)[place]))
        return self.rows[chosen]

    def _factor(self) -> float:
        """Of the learning rates: linear warmup, then cosine down to a twentieth."""
        gone = self._gone()
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * min(gone, 1.0))) / 2
        return min((self.done.step + 1) / WARMUP, 1.0) * decay

    def _gone(self) -> float:
        """How much of the training is over, by steps or by minutes."""
        gone = self.done.step / self.steps
        if self.minutes is not None:
            gone = max(gone, self.done.seconds / (60 * self.minutes))
        return gone

    def _time(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.done.seconds += wall - self.clock[0]
        self.done.cpu_seconds += cpu - self.clock[1]
        self.clock = wall, cpu

    def _ended(self) -> str:
        """Why it is over; empty while it is not."""
        done = self.done
        if done.step >= self.steps:
            return "steps"
        if self.minutes is not None and done.seconds >= 60 * self.minutes:
            return "minutes"
        settled = 0 if self.schedule is None else self.schedule.steps
        since = [r for r in done.evaluations if r["step"] > max(done.best_step, settled)]
        last = done.evaluations[-1]["step"] if done.evaluations else 0
        if self.patience and last == done.step and len(since) >= self.patience:
            return "no better"
        return ""

    # -- measuring

    def _evaluated(self) -> None:
        """Measure; keep what is best."""
        done = self.done
        row = {"step": float(done.step), **self._measure()}
        self._time()
        best = min((r["kl"] for r in done.evaluations), default=math.inf)
        done.evaluations.append({**row, "cpu_seconds": done.cpu_seconds})
        if row["kl"] < best:
            done.best_step = done.step
            done.best = self.trainee.values()
            done.best_shifts = self.thresholds.shifts.clone()

    def _measure(self) -> Row:
        """Perplexity, KL, live share and balance at the budget of the healing."""
        live = [0, 0]
        model, distiller, loads = self.model, self.distiller, Loads(self.model)

        def dense(ids: Tensor) -> Any:
            with distiller.dense() as teacher:
                return teacher(input_ids=ids, use_cache=False)

        def routed(ids: Tensor) -> Any:
            reset(model)
            with loads:
                output = model(input_ids=ids, use_cache=False)
            for _, counter in counters(model):
                live[0] += counter.units_live
                live[1] += counter.units_total
            return output

        with kept(model):
            _turn(self.settings)
            total = len(self.measured)
            scores = compare(
                dense, {"routed": routed}, [self.measured],
                progress=lambda rows: self.progress("evaluate", rows, total),
            )  # fmt: skip
        return {
            "perplexity": scores["routed"].perplexity,
            "dense": scores["dense"].perplexity,
            "kl": scores["routed"].mean_kl,
            "live": live[0] / max(live[1], 1),
            **loads.balance(),
        }

    def _save(self) -> None:
        if self.folder is not None:
            write(self.folder, self.plan, self.done, self.trainee, self.optimizer, self.thresholds)

    # -- the end

    def _finish(self, stopped: str) -> Healing:
        model, done, trainee = self.model, self.done, self.trainee
        _turn(self.settings)
        start = {k: v for k, v in done.evaluations[0].items() if k not in ("step", "cpu_seconds")}
        final = start
        trained = trainee.count
        improved = done.best_step > 0
        if improved:
            trainee.put(done.best)
            rows = self.rows[: max(SETTLED // self.rows.shape[1], 1)]
            resettle(model, lambda: model(input_ids=rows, use_cache=False))
            final = self._measure()
            improved = final["kl"] < start["kl"]  # thresholds were fitted on other text
        if improved:
            trainee.finish()
        else:
            trainee.undo()
            final = start
        self._time()
        found = Healing(
            model, str(self.plan["train"]), trained, self.active, str(self.plan["text"]), improved,
            start, final, done.best_step if improved else 0, tuple(done.steps),
            tuple(done.evaluations), done.seconds, done.cpu_seconds, stopped,
        )  # fmt: skip
        if improved:
            _tell(model, found)
        return found


def _tell(model: SparseModel, found: Healing) -> None:
    """Put the healing into the report; where weights changed, the dense limit is a new one."""
    note = found.summary()
    if found.train != "routers" and model.example:
        note += "; the dense limit is the healed model's, no longer the original's"
        with all_live(model), torch.no_grad():
            model.golden = tuple(t.detach() for t in model.graph.forward(*model.example))
    if isinstance(model.report, Report):
        model.report = dataclasses.replace(model.report, notes=(*model.report.notes, note))


def _diverged(step: int) -> SparsifyError:
    return BadInput(
        f"the loss is not finite at step {step + 1}", why="the learning rate is too high for it",
        help="a smaller rate; the model is as it was",
    )  # fmt: skip


def _frozen(model: SparseModel) -> nn.Module:
    """A copy at the dense limit that does not train."""
    twin = copy.deepcopy(model)
    set_active(twin, 1.0)
    return twin.requires_grad_(False)
