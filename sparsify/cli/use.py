"""Verbs that run a saved model: eval, generate, demo."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify import registry
from sparsify.cli import checks, show
from sparsify.cli.app import JsonFlag, QuietFlag, SavedArgument, SeedOption, app
from sparsify.cli.progress import bars
from sparsify.errors import BadInput


@app.command("eval")
def evaluate(
    saved: SavedArgument,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Text to measure on: a file, docstrings or licences.",
            show_default=False,
        ),
    ],
    active: Annotated[
        str, typer.Option(metavar="A,...", help="Active budgets to measure at.")
    ] = "1,0.75,0.5",
    calibration: Annotated[
        str, typer.Option(metavar="TEXT", help="Text that static pruning is fitted on.")
    ] = "docstrings",
    only: Annotated[
        str | None,
        typer.Option("--pass", metavar="NAME", help="Turn the dials of this pass only."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of TEXT at most.")] = 16384,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure perplexity at several budgets.

    Puts the dense model and static pruning at the same budget beside the routed model.
    """
    budgets = checks.fractions("--active", active)
    checks.at_least("--tokens", tokens, 2)
    if only is not None:
        registry.owner(only)  # an unknown name costs no waiting
    checks.text(text)
    checks.text(calibration)
    checks.saved(saved)
    with bars(quiet=quiet) as progress:
        from sparsify import api

        found = api.evaluate(
            saved,
            text,
            active=budgets,
            calibration=calibration,
            pass_name=only,
            tokens=tokens,
            progress=progress,
        )
    print(show.as_json(found.to_dict()) if json else found.text(width=show.width()))


@app.command()
def generate(
    saved: SavedArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    tokens: Annotated[int, typer.Option(metavar="N", help="New tokens at most.")] = 40,
    active: Annotated[
        float | None, typer.Option(metavar="A", help="Active budget, 0 < A <= 1.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token.")
    ] = 0.0,
    seed: SeedOption = 0,
    eager: Annotated[
        bool, typer.Option("--eager", help="Run on plain PyTorch, without kernels.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Continue PROMPT with a saved language model."""
    checks.fraction("--active", active)
    checks.at_least("--tokens", tokens, 1)
    if not 0 <= temperature < float("inf"):
        raise BadInput(f"--temperature cannot be {temperature:g}", help="0 or more")
    checks.saved(saved)
    from sparsify import api

    found = api.generate(
        saved,
        prompt,
        tokens=tokens,
        active=active,
        temperature=temperature,
        seed=seed,
        lower=not eager,
    )
    print(show.as_json(found.to_dict()) if json else found.text)


@app.command()
def demo(quiet: QuietFlag = False) -> int:
    """Tell the whole story on SmolLM2-135M.

    Converts it, checks it, turns the dial, and compares with static pruning.
    """
    with bars(quiet=quiet) as progress:
        from sparsify.demo import run

        return run(progress)
