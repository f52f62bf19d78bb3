"""What a healing is told: options that make sense, a checkpoint folder, and the text in rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sparsify.corpus import token_blocks
from sparsify.errors import BadInput, OutputError, did_you_mean
from sparsify.healing_state import TRAIN, exists
from sparsify.runtime.model import SparseModel
from sparsify.runtime.schedule import Shape

MEASURED = 2048  # tokens to measure on, at most


def rows_of(
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


def check_schedule(schedule: str | None, start: float, ramp: float) -> None:
    """BadInput for a schedule that is none."""
    shapes = get_args(Shape)
    if schedule is not None and schedule not in shapes:
        raise BadInput(
            f"no schedule '{schedule}'",
            help=did_you_mean(schedule, shapes) or f"one of: {', '.join(shapes)}",
        )
    for name, value in (("start", start), ("ramp", ramp)):
        if not 0 < value <= 1:
            raise BadInput(f"{name} cannot be {value:g}", help="above 0, at most 1")


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
