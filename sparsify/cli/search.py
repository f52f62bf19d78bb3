"""The verb that allocates budgets: search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import checks, show
from sparsify.cli.app import DTYPES, DtypeOption, ExampleOption, ModelArgument, QuietFlag, app
from sparsify.cli.app import SeedOption as Seed
from sparsify.cli.build import inputs
from sparsify.cli.progress import bars
from sparsify.errors import BadInput
from sparsify.searching_goal import target_of


@app.command()
def search(
    model: ModelArgument,
    target: Annotated[
        str,
        typer.Option(
            metavar="T",
            help="flops=0.6 or bytes=0.6 (shares of the dense model's), or speed=1.5 (decoding).",
            show_default=False,
        ),
    ],
    passes: Annotated[
        str,
        typer.Option("--passes", "-p", metavar="TEXT", help="Passes whose budgets are searched."),
    ] = "hidden-route",
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="X", help="Refuse what is further from the dense model (nats)."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Text to fit and measure on: a file, or docstrings, licences, reference, code or "
            "mixed.",
        ),
    ] = "mixed",
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of TEXT to measure on.")] = 512,
    levels: Annotated[
        str, typer.Option(metavar="A,...", help="Budgets that each unit is measured at.")
    ] = "0.5,0.25",
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Rounds of measuring again around the solution.")
    ] = 0,
    points: Annotated[int, typer.Option(metavar="N", help="Points of the Pareto front.")] = 6,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="RECIPE", help="Write the pipeline text that was found."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - prints it."),
    ] = None,
    example: ExampleOption = None,
    dtype: DtypeOption = None,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Find the budgets of layers and passes that lose least.

    Measures what each part of MODEL is worth, solves for the target, and prints the pipeline text.
    """
    target_of(target)
    checks.pipeline(passes)
    budgets = checks.fractions("--levels", levels)
    if max(budgets) >= 1:
        raise BadInput("--levels cannot hold 1", why="there nothing is lost", help="e.g. 0.5,0.25")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise BadInput(f"--max-kl cannot be {max_kl:g}", help="above 0, in nats a token")
    checks.at_least("--tokens", tokens, 2)
    checks.at_least("--rounds", rounds, 0)
    checks.at_least("--points", points, 0)
    checks.among("--dtype", dtype, DTYPES)
    checks.file("--example", example)
    checks.text(calibration)
    checks.output_file("--output", output, force=force)
    checks.output_file("--json", json, force=force)
    checks.model(model)
    with bars(quiet=quiet) as progress:
        from sparsify.searching import search as find

        found = find(
            model,
            target,
            passes=passes,
            max_kl=max_kl,
            calibration=calibration,
            tokens=tokens,
            levels=budgets,
            rounds=rounds,
            points=points,
            example=inputs(example),
            dtype=dtype,
            seed=seed,
            progress=progress,
        )
    if output is not None:
        show.emit(f"# {found.headline()}\n{found.pipeline}", output)
    if json is not None:
        show.emit(show.as_json(found.to_dict()), json)
    if str(json) != "-":
        print(found.text_table(width=show.width()))
        recipe = f"@{output}" if output is not None else f"'{found.pipeline}'"
        more = f" --seed {seed}" if seed else ""
        more += f" --dtype {dtype}" if dtype else ""
        print(f"\nsparsify compile {model} -p {recipe} --calibration {calibration}{more} -o OUT")
