"""Find the budgets that cost least quality: ``sparsify search MODEL --target flops=0.6``.

One conversion of the model gives routers with dials; what is searched is where they stand. Every
unit (:mod:`sparsify.searching_units`) is measured alone at a few levels, all else dense: the KL
divergence from the dense model at the model's end, on calibration text that no router was fitted
on. Between the measured levels the loss follows the routers' error tables. The levels with the
least sum of losses at a cost are a multiple-choice knapsack (:mod:`sparsify.knapsack`).

Sums of single losses are a first order only. So every solution is measured as a whole, costs are
corrected by the units that were really live, and in further rounds each unit is taken out of the
solution alone (all live, the others sparse): what that gains scales its losses, and the knapsack is
solved again. The best of all that was measured is the result, with one even budget and the
dial's own allocation among the candidates: a search never loses to them on its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify import api
from sparsify.calibration import BLOCK
from sparsify.calibration import TOKENS as FITTED
from sparsify.capture.causal import is_causal_lm
from sparsify.corpus import token_blocks
from sparsify.costs import CONTEXT
from sparsify.errors import BadInput
from sparsify.models import load_model
from sparsify.pipeline import Placed, State
from sparsify.searching_goal import Target, target_of
from sparsify.searching_measure import sample
from sparsify.searching_result import Search
from sparsify.searching_speed import timed
from sparsify.searching_target import Meter
from sparsify.searching_units import units_of
from sparsify.searching_work import Clock, Work

PASSES = "hidden-route"
LEVELS = (0.5, 0.25)  # that each unit is measured at
TOKENS = 512
ROUNDS = 0  # on SmolLM2 one lost more on held-out text, twice; on a model of 6 layers it gained
POINTS = 6  # of the front
Progress = Callable[[str, int, int], None]


def search(
    model: Any,
    target: str | Target,
    *,
    passes: str = PASSES,
    max_kl: float | None = None,
    calibration: str | Path | Sequence[str] | Iterable[Tensor] | None = "mixed",
    tokens: int = TOKENS,
    levels: Sequence[float] = LEVELS,
    rounds: int = ROUNDS,
    points: int = POINTS,
    example: Any = None,
    tokenizer: Any = None,
    dtype: Any = None,
    context: int = CONTEXT,
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Allocate a budget over layers and passes by measured sensitivity.

    Args:
        model: a dense causal language model, as for :func:`sparsify.compile`.
        target: ``flops=0.6``, ``bytes=0.6`` (shares of the dense model's, per token), or
            ``speed=1.5`` (times the dense model's decoding speed).
        passes: a pipeline text; its ``active`` options are what is searched.
        max_kl: refuse a setting further from the dense model than this, nats a token.
        calibration: text that routers are fitted on and settings are measured on.
        tokens: to measure on.
        levels: budgets that each unit is measured at.
        rounds: of measuring again around the solution.
        points: of the Pareto front.
        example, tokenizer, dtype, seed: as for :func:`sparsify.compile`.
        context: keys per token that the attention cost counts.
        progress: called with (what, done, total) during long work.

    Raises:
        BadInput: an unknown or unreachable target, no calibration text, no language model, or
            more than ``max_kl``. And as :func:`sparsify.compile`.
    """
    wanted = target_of(target) if isinstance(target, str) else target
    _check(calibration, tokens, levels, rounds, points, max_kl)
    assert calibration is not None
    text: Any = calibration if isinstance(calibration, str | Path) else list(calibration)
    clock = Clock()
    placed: list[Placed] = []

    def watch(_: Any, state: State) -> None:
        placed[:] = state.placed

    loaded = load_model(model, example=example, tokenizer=tokenizer)
    dense: Any = loaded.model
    if not is_causal_lm(dense, loaded.example):
        raise BadInput(
            "search needs a causal language model",
            why="settings are compared by the divergence of next-token probabilities",
        )
    clock.tick("load")
    sparse = api.compile(
        dense, passes, loaded.example, text, tokenizer=loaded.tokenizer,
        verify="end", dtype=dtype, seed=seed, context=context, progress=progress, on_step=watch,
    )  # fmt: skip
    clock.tick("compile")
    name, batches = token_blocks(
        text, loaded.tokenizer, length=BLOCK,
        limit=FITTED + max(tokens, BLOCK), seed=seed,
    )  # fmt: skip
    given = not isinstance(text, str | Path) and isinstance(text[0], Tensor)
    fitted = sum(b.numel() for b in batches) if given else FITTED
    if not any(each.routers for each in placed):
        raise BadInput(
            f"nothing in '{passes}' has a budget to search", help="for example: hidden-route"
        )
    meter = Meter.of(sparse, wanted.kind, context=context)
    vocabulary = int(getattr(sparse.call_spec, "vocabulary", 1))
    ids, note = sample(batches, fitted, tokens, vocabulary)
    units = units_of(sparse.graph, placed, context=context)
    if wanted.kind == "speed":
        meter = timed(meter, sparse, dense, context=context, seed=seed, progress=progress)
    work = Work(sparse, passes, placed, units, ids, meter, context, progress)
    clock.tick("prepare")
    found = work.search(wanted, levels, rounds, points, clock, max_kl)
    return dataclasses.replace(
        found, model=loaded.name, text=name, seed=seed, calibration=name,
        notes=(*found.notes, *([note] if note else []), *meter.notes), machine=api.machine(),
    )  # fmt: skip


def _check(
    calibration: Any,
    tokens: int,
    levels: Sequence[float],
    rounds: int,
    points: int,
    max_kl: float | None,
) -> None:
    if calibration is None:
        raise BadInput(
            "search needs calibration text",
            why="budgets go where the output changes least, which is measured on text",
            help="calibration='mixed', a file, texts, or batches of token ids",
        )
    if tokens < 2 or rounds < 0 or points < 0:
        raise BadInput(f"tokens={tokens}, rounds={rounds}, points={points}: out of range")
    if not levels or not all(0 < level < 1 for level in levels):
        raise BadInput(f"levels={list(levels)} are no budgets", help="between 0 and 1, e.g. 0.5")
    if max_kl is not None and not max_kl > 0:
        raise BadInput(f"max_kl={max_kl} is no divergence", help="above 0, in nats a token")
