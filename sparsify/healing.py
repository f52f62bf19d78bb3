"""heal: train a routed model until it is near the dense one again, for minutes, not days.

The dense model teaches the routed one (:mod:`sparsify.healing_loss`) on a little text. What trains:

* ``routers``: routers and what stands in for dead units. The dense limit stays what it was.
* ``lora``: those, and a low-rank change of the routed modules' weights, merged in at the end.
* ``all``: every weight; the teacher is then a frozen copy of the model (memory for two).

Budgets hold meanwhile (:class:`sparsify.runtime.training.Thresholds`) and thresholds are fitted
anew at the end. A tenth of the text is kept for measuring: the best step by mean KL wins, and a
model that did not get better is left as it was, and that is said.
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

from sparsify.corpus import token_blocks
from sparsify.errors import BadInput, OutputError, SparsifyError, did_you_mean
from sparsify.evaluate import compare
from sparsify.healing_loss import Distiller
from sparsify.healing_state import TRAIN, Progressed, Train, Trainee, exists, read, write
from sparsify.report import Report
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.dial import kept, set_active
from sparsify.runtime.model import SparseModel
from sparsify.runtime.training import Thresholds, masked, resettle
from sparsify.saved import budget, load
from sparsify.static_pruning import all_live

Progress = Callable[[str, int, int], None]
# AdamW steps are about the learning rate in every coordinate: per kind of parameter.
RATES = {"routers": 1e-3, "stand-ins": 1e-3, "lora": 1e-3, "weights": 2e-5}
MEASURED = 2048  # tokens to measure on, at most
SETTLED = 2048  # tokens that thresholds are fitted on at the end
WARMUP = 5  # steps


@dataclasses.dataclass(frozen=True)
class Healing:
    """A healed model and how it got there.

    Attributes:
        model: the model that was given, healed in place.
        train: what was trained; trained: how many numbers.
        active: mean budget; text: name of the text.
        improved: whether it got better; where not, the model is as it was.
        start, final: ``perplexity``, ``dense``, ``kl`` (nats), ``live`` on the measuring text.
        best_step: after which the kept weights came.
        steps: a row per step: loss parts, gradient norm, budget, live share, learning rate factor.
        evaluations: a row per evaluation.
        seconds, cpu_seconds: wall and processor time, over all processes of a resumed healing.
        stopped: why it ended: ``steps``, ``minutes`` or ``no better``.
    """

    model: SparseModel
    train: str
    trained: int
    active: float
    text: str
    improved: bool
    start: dict[str, float]
    final: dict[str, float]
    best_step: int
    steps: tuple[dict[str, float], ...]
    evaluations: tuple[dict[str, float], ...]
    seconds: float
    cpu_seconds: float
    stopped: str

    @property
    def closed(self) -> float:
        """Share of the gap in perplexity to the dense model that was closed on this text."""
        gap = self.start["perplexity"] - self.start["dense"]
        return (self.start["perplexity"] - self.final["perplexity"]) / gap if gap > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the model."""
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"
        }
        return {
            "format": "sparsify-healing", "format_version": 1, **plain, "closed": self.closed,
        }  # fmt: skip

    def summary(self) -> str:
        """One line."""
        if not self.improved:
            return f"healing ({self.train}) did not improve the model, which is as it was"
        a, b = self.start, self.final
        return (
            f"healed ({self.train}, {self.trained:,} numbers, {self.best_step} steps on "
            f"{self.text}): perplexity {a['perplexity']:.2f} -> {b['perplexity']:.2f}, dense "
            f"{a['dense']:.2f}; {self.closed:.0%} of the gap closed at {b['live']:.1%} live"
        )

    def text_table(self, width: int = 100) -> str:
        """The evaluations as a table, and the summary."""
        lines = [f"{'step':>6}{'perplexity':>12}{'ratio':>8}{'KL':>8}{'live':>8}"]
        rows = [*self.evaluations, {"step": math.nan, **self.final}]
        for row in rows:
            step = "final" if row is rows[-1] else f"{row['step']:.0f}"
            lines.append(
                f"{step:>6}{row['perplexity']:>12.3f}{row['perplexity'] / row['dense']:>8.3f}"
                f"{row['kl']:>8.3f}{row['live']:>8.1%}"
            )
        took = f"{self.seconds / 60:.1f} minutes ({self.cpu_seconds / 60:.1f} of CPU)"
        return "\n".join([*lines, "", self.summary(), f"took {took}; ended by: {self.stopped}"])


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
    shards: int = 0,
    kl: float = 1.0,
    mse: float = 1.0,
    ce: float = 0.0,
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
        train: ``routers``, ``lora`` or ``all``.
        active: budget to heal at; default: what the model is set to.
        steps: of AdamW, with warmup and cosine decay.
        minutes: of wall time; the decay then follows whichever of the two ends first.
        batch: sequences per step; length: tokens of each.
        rate: factor on the learning rates of ``RATES``.
        rank: of LoRA.
        shards: above 0, LoRA's factors are put together from shards, this many a vector, of pools
            that the weights share (:mod:`sparsify.runtime.shards`); as many numbers train.
        kl, mse, ce: how much each part of the loss counts.
        every: steps between evaluations (and checkpoints).
        patience: evaluations without improvement before it stops; 0 = never.
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
    folder = None if checkpoint is None else Path(checkpoint)
    check_checkpoint(folder, resume)
    sparse = model if isinstance(model, SparseModel) else load(model)
    if sparse.kind != "causal-lm":
        raise BadInput("only causal language models can be healed", help=f"this is a {sparse.kind}")
    name, rows, measured = _text(sparse, text, tokenizer, batch, length, steps, seed)
    plan = {
        "train": train, "active": active, "steps": steps, "batch": batch, "length": length,
        "rate": rate, "rank": rank, "kl": kl, "mse": mse, "ce": ce, "every": every,
        "shards": shards, "seed": seed, "text": name, "tokens": rows.numel(),
        "sum": int(rows.sum()), "pipeline": sparse.pipeline,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        if active is not None:
            set_active(sparse, active)
        training = [m for m in sparse.modules() if m.training]
        sparse.eval()
        teacher = _frozen(sparse) if train == "all" else None
        trainee = Trainee.of(sparse, train, rank=rank, seed=seed, pieces=shards)
        stack.callback(trainee.unfreeze)
        stack.callback(lambda: [m.train() for m in training])
        run = _Run(
            sparse, trainee, Distiller(sparse, kl, mse, ce, teacher), plan, rows, measured,
            minutes=minutes, patience=patience, folder=folder, progress=progress,
        )  # fmt: skip
        try:
            found = run.all(resume)
        except BaseException:
            trainee.undo()
            raise
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


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
        groups = [
            {"params": list(group.values()), "lr": 0.0, "top": RATES[kind] * plan["rate"]}
            for kind, group in trainee.groups.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.thresholds = Thresholds(model)
        self.done = Progressed()
        self.clock = (time.perf_counter(), time.process_time())

    def all(self, resume: bool) -> Healing:
        """From the start, or from a checkpoint, to the end."""
        done = self.done
        settings = [(r, r.setting) for r in self._routers()]
        with self.thresholds, masked(self.model):
            if resume and self.folder is not None:
                self.done = done = read(
                    self.folder, self.plan, self.trainee, self.optimizer, self.thresholds
                )
            else:
                self._evaluated(settings)
            stopped = ""
            while not (stopped := self._ended()):
                self._step()
                if done.step % int(self.plan["every"]) == 0 or self._ended():
                    self._evaluated(settings)
                    self._save()
        return self._finish(stopped, settings)

    def _routers(self) -> list[Any]:
        with kept(self.model) as members:
            return members

    # -- one step

    def _step(self) -> None:
        done = self.done
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
        gone = self.done.step / self.steps
        if self.minutes is not None:
            gone = max(gone, self.done.seconds / (60 * self.minutes))
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * min(gone, 1.0))) / 2
        return min((self.done.step + 1) / WARMUP, 1.0) * decay

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
        since = [row for row in done.evaluations if row["step"] > done.best_step]
        last = done.evaluations[-1]["step"] if done.evaluations else 0
        if self.patience and last == done.step and len(since) >= self.patience:
            return "no better"
        return ""

    # -- measuring

    def _evaluated(self, settings: list[tuple[Any, Any]]) -> None:
        """Measure; keep what is best."""
        done = self.done
        row = {"step": float(done.step), **self._measure(settings)}
        self._time()
        best = min((r["kl"] for r in done.evaluations), default=math.inf)
        done.evaluations.append({**row, "cpu_seconds": done.cpu_seconds})
        if row["kl"] < best:
            done.best_step = done.step
            done.best = self.trainee.values()
            done.best_shifts = self.thresholds.shifts.clone()

    def _measure(self, settings: list[tuple[Any, Any]]) -> dict[str, float]:
        """Perplexity, KL and live share at the full budget of the healing."""
        live = [0, 0]
        model, distiller = self.model, self.distiller

        def dense(ids: Tensor) -> Any:
            with distiller.dense() as teacher:
                return teacher(input_ids=ids, use_cache=False)

        def routed(ids: Tensor) -> Any:
            reset(model)
            output = model(input_ids=ids, use_cache=False)
            for _, counter in counters(model):
                live[0] += counter.units_live
                live[1] += counter.units_total
            return output

        with kept(model):
            for router, setting in settings:
                router.setting = setting
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
        }

    def _save(self) -> None:
        if self.folder is not None:
            write(self.folder, self.plan, self.done, self.trainee, self.optimizer, self.thresholds)

    # -- the end

    def _finish(self, stopped: str, settings: list[tuple[Any, Any]]) -> Healing:
        model, done, trainee = self.model, self.done, self.trainee
        for router, setting in settings:
            router.setting = setting
        start = {k: v for k, v in done.evaluations[0].items() if k not in ("step", "cpu_seconds")}
        final = start
        trained = trainee.count
        improved = done.best_step > 0
        if improved:
            trainee.put(done.best)
            rows = self.rows[: max(SETTLED // self.rows.shape[1], 1)]
            resettle(model, lambda: model(input_ids=rows, use_cache=False))
            final = self._measure(settings)
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


def _text(
    model: SparseModel,
    text: Any,
    tokenizer: Any,
    batch: int,
    length: int,
    steps: int,
    seed: int,
) -> tuple[str, Tensor, Tensor]:
    """(name, rows to train on, rows to measure on): the last tenth is for measuring."""
    wanted = steps * batch * length
    name, batches = token_blocks(
        text, model.tokenizer if tokenizer is None else tokenizer,
        length=length, limit=wanted + max(wanted // 9, length), seed=seed,
    )  # fmt: skip
    widths = {ids.shape[1] for ids in batches}
    if len(widths) > 1:
        raise BadInput("token ids of one length are needed", why=f"there are {sorted(widths)}")
    rows = torch.cat(batches)
    if len(rows) < 2 or rows.shape[1] < 2:
        raise BadInput(
            "the text is too short to heal on",
            why=f"it gives {len(rows)} sequence of {rows.shape[1]} tokens; one is needed to train "
            "on, another to measure on",
            help="give more text, or a smaller length",
        )
    most = max(MEASURED // rows.shape[1], 1)
    held = min(max(len(rows) // 10, 1), most)
    return name, rows[:-held], rows[-held:]


def check_options(
    train: str,
    steps: int,
    minutes: float | None,
    batch: int,
    length: int,
    rate: float,
    rank: int,
    weights: tuple[float, float, float],
    every: int,
) -> None:
    """BadInput for the first option that makes no sense."""
    if train not in TRAIN:
        raise BadInput(
            f"train cannot be '{train}'",
            help=did_you_mean(train, TRAIN) or f"one of: {', '.join(TRAIN)}",
        )
    counts = {"steps": steps, "batch": batch, "length": length, "rank": rank, "every": every}
    for name, value in counts.items():
        least = 2 if name == "length" else 1
        if value < least:
            raise BadInput(f"{name} cannot be {value}", help=f"at least {least}")
    for name, number in (("minutes", minutes), ("rate", rate)):
        if number is not None and not 0 < number < math.inf:
            raise BadInput(f"{name} cannot be {number:g}", help="above 0")
    if not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise BadInput(
            f"the parts of the loss cannot count {', '.join(f'{w:g}' for w in weights)}",
            help="kl, mse and ce are 0 or more, and one of them is above 0",
        )


def check_checkpoint(folder: Path | None, resume: bool) -> None:
    """OutputError where a checkpoint would be overwritten; BadInput where none is to be found."""
    if folder is None:
        if resume:
            raise BadInput("nothing to resume from", help="name the folder: checkpoint=...")
        return
    if resume and not exists(folder):
        raise BadInput(f"no checkpoint in {folder}", help="start without resume")
    if not resume and exists(folder):
        raise OutputError(
            f"{folder} holds an unfinished healing", help="resume it, or remove that folder"
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", help="name a folder")
