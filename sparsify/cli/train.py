"""The verb that trains a saved model: heal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from sparsify.cli import checks, show
from sparsify.cli.app import QuietFlag, SavedArgument, SeedOption, app
from sparsify.cli.progress import bars
from sparsify.errors import BadInput

TRAIN = ("routers", "lora", "routed", "all")
SHAPES = ("linear", "cosine", "cubic")


@app.command()
def heal(
    saved: SavedArgument,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Text to train on: a file (text or JSONL), docstrings, licences, reference, "
            "code or mixed.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT2", help="Folder to write.", show_default=False),
    ],
    train: Annotated[
        str, typer.Option(metavar="WHAT", help="What trains: routers | lora | routed | all.")
    ] = "lora",
    active: Annotated[
        float | None,
        typer.Option(metavar="A", help="Budget to heal at, 0 < A <= 1; as saved if absent."),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Training steps at most.")] = 100,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Minutes to train at most.")
    ] = None,
    rate: Annotated[float, typer.Option(metavar="R", help="Factor on the learning rates.")] = 1.0,
    rank: Annotated[int, typer.Option(metavar="N", help="Rank of the changes under lora.")] = 8,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences of a step.")] = 2,
    half: Annotated[
        bool, typer.Option("--half", help="Train in bfloat16; weights and measures stay float32.")
    ] = False,
    shards: Annotated[
        int,
        typer.Option(metavar="N", help="Shards of a vector, in pools for all weights; 0 = none."),
    ] = 0,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Go down from --start: linear | cosine | cubic."),
    ] = None,
    start: Annotated[
        float, typer.Option(metavar="A", help="Budget of the first step of a schedule.")
    ] = 1.0,
    ramp: Annotated[
        float, typer.Option(metavar="S", help="Share of the steps that a schedule takes.")
    ] = 0.5,
    every: Annotated[
        int, typer.Option(metavar="N", help="Steps between measurements and checkpoints.")
    ] = 20,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in OUT2.healing.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the curves as JSON; - prints it."),
    ] = None,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a saved model towards the dense one.

    Saves it to OUT2. The dense model teaches it. Checkpoints go to OUT2.healing and are removed at
    the end.
    """
    checks.fraction("--active", active)
    checks.among("--train", train, TRAIN)
    if schedule is not None:
        checks.among("--schedule", schedule, SHAPES)
    checks.fraction("--start", start)
    checks.fraction("--ramp", ramp)
    for option, count in (
        ("--steps", steps),
        ("--rank", rank),
        ("--every", every),
        ("--batch", batch),
    ):
        checks.at_least(option, count, 1)
    checks.at_least("--shards", shards, 0)
    for option, number in (("--rate", rate), ("--minutes", minutes)):
        if number is not None and not 0 < number < float("inf"):
            raise BadInput(f"{option} cannot be {number:g}", help="above 0")
    checks.saved(saved)
    checks.text(text)
    checks.output_folder(output, force=force)
    checks.output_file("--json", json, force=force)
    checkpoint = output.with_name(f"{output.name}.healing")
    with bars(quiet=quiet) as progress:
        from sparsify import api
        from sparsify.healing import heal as train_it

        model = api.load(saved)
        found = train_it(
            model,
            text,
            train=cast("Literal['routers', 'lora', 'routed', 'all']", train),
            active=active,
            steps=steps,
            minutes=minutes,
            rate=rate,
            rank=rank,
            batch=batch,
            half=half,
            shards=shards,
            schedule=cast("Literal['linear', 'cosine', 'cubic'] | None", schedule),
            start=start,
            ramp=ramp,
            every=every,
            seed=seed,
            checkpoint=checkpoint,
            resume=resume,
            progress=progress,
        )
        model.save(output, force=force)
    if json is not None:
        show.emit(show.as_json(found.to_dict()), json)
    if str(json) != "-":
        print(found.text_table(width=show.width()))
        print(f"saved {output}")
