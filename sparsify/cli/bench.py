"""The verb that times models: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import checks, show
from sparsify.cli.app import (
    CalibrationOption,
    ExampleOption,
    PipelineOption,
    QuietFlag,
    SeedOption,
    app,
)
from sparsify.cli.build import inputs
from sparsify.cli.progress import bars
from sparsify.errors import BadInput


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A dense model (with -p), or a folder that `sparsify compile` wrote.",
            show_default=False,
        ),
    ],
    pipeline: PipelineOption = None,
    active: Annotated[
        str, typer.Option(metavar="A,...", help="Active budgets to measure at.")
    ] = "1,0.75,0.5",
    tokens: Annotated[
        str,
        typer.Option(metavar="N,...", help="Up to 8: sequences that decode; more: a prefill."),
    ] = "1,8,64,512",
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens in the cache before a decoded one.")
    ] = 128,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds that count.")] = 9,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model of a saved one; as compiled from if absent.",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile too; takes minutes.")
    ] = False,
    example: ExampleOption = None,
    calibration: CalibrationOption = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the table as JSON; - prints it."),
    ] = None,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Time a routed model against the dense one.

    Decode, small batch and prefill, each with the speed that is possible; interleaved.
    """
    budgets, counts = checks.fractions("--active", active), checks.counts("--tokens", tokens)
    checks.at_least("--context", context, 1)
    checks.at_least("--rounds", rounds, 1)
    checks.pipeline(pipeline)
    checks.file("--example", example)
    checks.text(calibration)
    checks.output_file("--json", json, force=force)
    checks.model(model)
    if dense is not None:
        checks.model(dense)
    if checks.convertible(model, pipeline) and calibration is not None:
        raise BadInput(
            "--calibration is of no use to a saved model", help="it was fitted when it was compiled"
        )
    with bars(quiet=quiet) as progress:
        from sparsify import api

        found = api.bench(
            model,
            pipeline,
            active=budgets,
            tokens=counts,
            context=context,
            rounds=rounds,
            dense=dense,
            compiled=compiled,
            example=inputs(example),
            calibration=calibration,
            seed=seed,
            progress=progress,
        )
    if json is not None:
        show.emit(show.as_json(found.to_dict()), json)
    if str(json) != "-":
        print(found.text(width=show.width()), end="")
