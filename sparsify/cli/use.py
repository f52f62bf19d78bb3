"""Verbs that run a saved model: eval, generate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import checks, show
from sparsify.cli.app import JsonFlag, QuietFlag, SavedArgument, SeedOption, app
from sparsify.cli.progress import bars
from sparsify.errors import BadInput


@app.command("eval")
def evaluate(
    saved: SavedArgument,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text to measure on.", show_default=False)
    ],
    active: Annotated[
        str, typer.Option(metavar="A,...", help="Active budgets to measure at.")
    ] = "1,0.75,0.5",
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure perplexity at several budgets.

    Puts the dense model and static pruning at the same budget beside the routed model.
    """
    budgets = checks.fractions("--active", active)
    checks.text_file("--text", text)
    checks.saved(saved)
    from sparsify import api

    with bars(quiet=quiet) as progress:
        found = api.evaluate(saved, text, active=budgets, progress=progress)
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
    json: JsonFlag = False,
) -> None:
    """Continue PROMPT with a saved language model."""
    checks.fraction("--active", active)
    if tokens < 1:
        raise BadInput(f"--tokens cannot be {tokens}", help="at least 1")
    if not 0 <= temperature < float("inf"):
        raise BadInput(f"--temperature cannot be {temperature:g}", help="0 or more")
    checks.saved(saved)
    from sparsify import api

    found = api.generate(
        saved, prompt, tokens=tokens, active=active, temperature=temperature, seed=seed
    )
    print(show.as_json(found.to_dict()) if json else found.text)


@app.command()
def demo(
    quiet: QuietFlag = False,
) -> int:
    """Tell the whole story on SmolLM2-135M.

    Converts it, checks it, turns the dial, and compares with static pruning.
    """
    from sparsify.demo import run

    return run()
