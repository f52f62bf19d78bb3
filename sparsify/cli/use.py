"""Verbs that run a saved model: eval, generate, demo."""

from __future__ import annotations

from pathlib import Path
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
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text to measure on: a file (text or JSONL), docstrings, licences, reference, "
            "code or mixed. An encoder is measured on its sentences.",
            show_default=False,
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Multiple-choice questions: a JSONL file of question, choices and answer.",
            show_default=False,
        ),
    ] = None,
    active: Annotated[
        str, typer.Option(metavar="A,...", help="Active budgets to measure at.")
    ] = "1,0.75,0.5",
    calibration: Annotated[
        str, typer.Option(metavar="TEXT", help="Text that the baselines are fitted on.")
    ] = "docstrings",
    baselines: Annotated[
        str, typer.Option(metavar="B,...", help="At the same budget: static, teal, both or none.")
    ] = "static,teal",
    only: Annotated[
        str | None,
        typer.Option("--pass", metavar="NAME", help="Turn the dials of this pass only."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of TEXT at most.")] = 16384,
    questions: Annotated[int, typer.Option(metavar="N", help="Questions at most.")] = 1000,
    top: Annotated[
        int, typer.Option(metavar="K", help="Nearest sentences that are compared.")
    ] = 10,
    pooling: Annotated[
        str, typer.Option(metavar="HOW", help="A sentence's embedding: mean or first token.")
    ] = "mean",
    resamples: Annotated[
        int, typer.Option(metavar="N", help="Bootstrap resamples; 0 makes no intervals.")
    ] = 1000,
    seed: SeedOption = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure quality at several budgets.

    On text: perplexity, divergence from the dense model and agreement with it. On questions:
    accuracy. Encoders: embeddings and their neighbours. The dense model, static pruning at the same
    budget and TEAL at as many operations stand beside the routed model, with bootstrap intervals.
    """
    budgets = checks.fractions("--active", active)
    checks.at_least("--tokens", tokens, 2)
    checks.at_least("--questions", questions, 1)
    checks.at_least("--top", top, 1)
    checks.at_least("--resamples", resamples, 0)
    checks.among("--pooling", pooling, ("mean", "first"))
    rivals = tuple(name for name in baselines.split(",") if name not in ("", "none"))
    for name in rivals:
        checks.among("--baselines", name, ("static", "teal"))
    if text is None and choices is None:
        raise BadInput("there is nothing to measure on", help="--text TEXT, or --choices FILE")
    if only is not None:
        registry.owner(only)  # an unknown name costs no waiting
    checks.text(text)
    checks.file("--choices", choices)
    checks.questions(choices)
    checks.text(calibration)
    checks.saved(saved)
    with bars(quiet=quiet) as progress:
        from sparsify import api

        found = api.evaluate(
            saved,
            text,
            choices=choices,
            active=budgets,
            calibration=calibration,
            baselines=rivals,
            pass_name=only,
            tokens=tokens,
            questions=questions,
            top=top,
            pooling=pooling,
            resamples=resamples,
            seed=seed,
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
