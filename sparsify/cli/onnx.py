"""The verb that writes a saved model for other runtimes: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import checks, show
from sparsify.cli.app import JsonFlag, QuietFlag, SavedArgument, app
from sparsify.cli.progress import bars
from sparsify.codegen.onnx import targets, write
from sparsify.codegen.onnx.asked import counts


@app.command()
def export(
    saved: SavedArgument,
    output: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The ONNX file to write; or FOLDER/, with what clients read beside the model.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="T",
            help="portable: the standard's operators only; ort: ONNX Runtime's own, where faster;"
            " ort-custom: ours too, in a library built beside FILE (needs a C compiler).",
        ),
    ] = "portable",
    active: Annotated[
        float | None,
        typer.Option(metavar="A", help="Active budget in the file, 0 < A <= 1; as OUT if absent."),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Opset to write, 18 to 24; if absent 20 (int4: 21), for ort 23."
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="mask: dead units are set to zero; branch: unused experts are not run; moe (ort):"
            " as its MoE operator; custom (ort-custom): as ours; auto: the fastest of them by"
            " measurement, or dense where none is faster. Absent: mask for portable, else auto.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a call that auto times; 1 is decoding.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Threads of ONNX Runtime that auto times; all cores if absent."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            help="float32, float16, bfloat16, int8 or int4: how matrices are stored; as OUT if"
            " absent.",
        ),
    ] = None,
    external_data: Annotated[
        bool,
        typer.Option(
            "--external-data", help="Weights into FILE.data; by itself where they exceed 2 GiB."
        ),
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not hold the file against the model.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write a saved model as ONNX.

    The file computes what the model computes at its present budget, and is held against it in ONNX
    Runtime. Language models get key/value cache inputs and outputs, named as Optimum names them.
    """
    checks.fraction("--active", active)
    checks.at_least("--tokens", tokens, 1)
    if threads is not None:
        checks.at_least("--threads", threads, 1)
    counts(tokens, threads, targets.routing(target, routing))
    targets.check(target, targets.routing(target, routing), opset, weights or "float32")
    checks.saved(saved)
    if write.is_folder(output):
        write.check_folder(Path(output), force=force)
    else:
        checks.output_file("FILE", Path(output), force=force)
    checks.onnx(check=not no_check)
    with bars(quiet=quiet) as progress:
        from sparsify import api

        model = api.load(saved)
        if active is not None:
            model.set_active(active)
        found = model.export(
            output,
            target=target,
            opset=opset,
            routing=routing,
            tokens=tokens,
            threads=threads,
            weights=weights,
            external_data=True if external_data else None,
            check=not no_check,
            force=force,
            progress=progress,
        )
    print(show.as_json(found.to_dict()) if json else found.text())
