"""The verbs. Each checks its arguments before torch loads, calls one function of sparsify.api, shows it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import sparsify
from sparsify.cli import bug, checks, machine, passes, show
from sparsify.cli.progress import bars
from sparsify.errors import BadInput

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing rich takes longer than all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn pretrained dense models into routed sparse ones that are equal at initialization.",
    epilog="Exit codes: 0 done, 1 a claim failed, 2 usage or bad input, 3 nothing matched.",
)

_MODEL_HELP = (
    "HF folder or id, GGUF file, module:function, .pt2 file, or zoo:NAME (zoo:llama)."
)
Model = Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=False)]
Saved = Annotated[str, typer.Argument(help="A folder that compile wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Pipeline = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--pipeline",
        help="Passes and options, as in 'ffn-moe{experts=8},attn-moh', or @recipe.txt.",
        show_default=False,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Text file that routers and clusters are fitted on.", show_default=False),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float64; the model's own if absent.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
