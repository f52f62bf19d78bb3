"""The typer application and the arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sparsify

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing rich takes longer than all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a claim failed, 2 usage or bad input, 3 nothing matched.",
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="HF folder or id, GGUF file, module:function, .pt2 file, zoo:NAME, smollm2.",
        show_default=False,
    ),
]
SavedArgument = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="A folder that `sparsify compile` wrote.", show_default=False
    ),
]
PipelineOption = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        "-p",
        metavar="TEXT",
        help="Passes and options, 'ffn-moe{experts=8},attn-moh', or @recipe.txt.",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text that routers are fitted on: a file (text or JSONL), docstrings, licences, "
        "reference, code or mixed.",
        show_default=False,
    ),
]
ExampleOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Inputs to capture with: safetensors, a tensor for each keyword.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="float32, bfloat16 or float64; as the model if absent."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Seed of everything random.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]

DTYPES = ("float32", "bfloat16", "float64")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsify-fx {sparsify.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Turn pretrained dense models into routed sparse ones that are equal at initialization."""
