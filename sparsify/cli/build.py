"""Verbs that look at and rewrite models: inspect, compile, diff, verify, bisect, reproduce."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from sparsify.cli import bug, checks, graphs, show
from sparsify.cli.app import (
    DTYPES,
    CalibrationOption,
    DtypeOption,
    ExampleOption,
    JsonFlag,
    ModelArgument,
    PipelineOption,
    QuietFlag,
    SavedArgument,
    SeedOption,
    app,
)
from sparsify.cli.progress import bars
from sparsify.errors import BadInput, NothingRewritten


@app.command()
def inspect(
    model: ModelArgument,
    example: ExampleOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show what the matcher finds in MODEL.

    Lists its regions, what could apply to them, and the near misses; changes nothing.
    """
    checks.model(model)
    checks.file("--example", example)
    with bars(quiet=quiet) as progress:
        from sparsify import api

        found = api.inspect(model, inputs(example), progress=progress)
    print(show.as_json(found.to_dict()) if json else found.text(width=show.width()))


@app.command()
def compile(  # noqa: A001  (the verb's name)
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False),
    ],
    pipeline: PipelineOption = None,
    example: ExampleOption = None,
    calibration: CalibrationOption = None,
    active: Annotated[
        float | None,
        typer.Option(metavar="A", help="Active budget to start with, 0 < A <= 1."),
    ] = None,
    verify: Annotated[
        str, typer.Option(metavar="WHEN", help="Check claims: each | end | off.")
    ] = "each",
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the report as JSON; - prints it."),
    ] = None,
    print_after: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Print the graph after passes: change | all."),
    ] = None,
    emit_graph: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the graph after every pass to DIR."),
    ] = None,
    emit_triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the Triton kernels that OUT uses on a GPU to DIR."),
    ] = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Rewrite MODEL and save it to OUT.

    Runs the passes of the pipeline, checks every claim, and prints the report.
    """
    checks.pipeline(pipeline)
    checks.fraction("--active", active)
    checks.among("--verify", verify, ("each", "end", "off"))
    checks.among("--dtype", dtype, DTYPES)
    checks.among("--print-after", print_after, ("change", "all"))
    checks.file("--example", example)
    checks.text(calibration)
    checks.output_folder(output, force=force)
    checks.output_file("--json", json, force=force)
    checks.graph_folder("--emit-graph", emit_graph, force=force)
    checks.graph_folder("--emit-triton", emit_triton, force=force)
    checks.triton("--emit-triton", emit_triton)
    checks.model(model)
    with bars(quiet=quiet) as progress:
        from sparsify import api

        sparse = api.compile(
            model,
            pipeline,
            inputs(example),
            calibration=calibration,
            active=active,
            verify=cast("Literal['each', 'end', 'off']", verify),
            seed=seed,
            dtype=dtype,
            progress=progress,
            on_step=graphs.watcher(print_after, emit_graph),
        )
        report: Any = sparse.report
        refuse_unchanged(report)
        sparse.save(output, force=force)
        emitted = None if emit_triton is None else kernels(sparse, emit_triton, force)
    if json is not None:
        show.emit(show.as_json(report.to_dict()), json)
    if str(json) != "-":
        show.report(report)
        print(f"saved {output}")
        if emitted:
            print(emitted)


def kernels(model: Any, folder: Path, force: bool) -> str:
    """Write the model's Triton kernels; says what was written, and what has no kernel."""
    from sparsify.codegen.triton import dump

    files, left = dump.emit(model, folder, force=force)
    lines = [f"wrote {len(files)} kernels to {folder}"]
    why = {remark.reason for remark in left}
    lines += [f"  without: {sum(r.reason == w for r in left)} modules: {w}" for w in sorted(why)]
    return "\n".join(lines)


def inputs(example: Path | None) -> dict[str, Any] | None:
    """The keyword arguments that a safetensors file holds."""
    if example is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(example))
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"--example {example} is not a readable safetensors file", why=str(error)
        ) from None


def refuse_unchanged(report: Any) -> None:
    """Raise NothingRewritten, with the first reasons, where no pass rewrote any region."""
    if any(step.count("applied") for step in report.steps):
        return
    left = [r for step in report.steps for r in step.remarks if r.kind == "left"]
    first = left[0]
    others = len(left) - 1
    raise NothingRewritten(
        f"{first.pass_name} cannot rewrite {first.region or 'the model'}"
        + (f", nor can any pass {others} other region{'s' * (others > 1)}" if others else ""),
        why=first.reason,
        where=f"--> {first.where}" if first.where else None,
        help=first.suggestion,
    )


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A saved model or a report's JSON.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    json: JsonFlag = False,
) -> None:
    """Put two models or reports side by side."""
    from sparsify import api

    found = api.diff(a, b)
    print(show.as_json(found.to_dict()) if json else found.text(width=show.width()))


@app.command()
def verify(saved: SavedArgument, json: JsonFlag = False) -> int:
    """Check the claims of a saved model."""
    checks.saved(saved)
    from sparsify import api

    found = api.verify(saved)
    print(show.as_json(found.to_dict()) if json else found.text(width=show.width()))
    return 0 if found.ok else 1


@app.command()
def bisect(
    model: ModelArgument,
    pipeline: PipelineOption = None,
    example: ExampleOption = None,
    calibration: CalibrationOption = None,
    seed: SeedOption = 0,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> int:
    """Find the region that breaks a claim."""
    if pipeline is None:
        raise BadInput("bisect needs a pipeline", help="-p 'ffn-moe{experts=8}'")
    checks.pipeline(pipeline)
    checks.file("--example", example)
    checks.text(calibration)
    checks.model(model)
    with bars(quiet=quiet) as progress:
        from sparsify import api

        found = api.bisect(
            model, pipeline, inputs(example), calibration, seed=seed, progress=progress
        )
    print(show.as_json(found.to_dict()) if json else found.text(width=show.width()))
    return 0 if found.ok else 1


@app.command()
def reproduce(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that an error named.")],
    json: JsonFlag = False,
) -> int:
    """Run what an error kept in DIR again."""
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}", help="DIR is what the error message named")
    command = bug.recorded(folder)
    if command is not None:
        args, where = command
        if where.is_dir():
            os.chdir(where)
        from sparsify.cli.entry import main

        return main(args)
    from sparsify import api

    found = api.reproduce(folder)
    print(show.as_json(found.to_dict()) if json else found.text(width=show.width()))
    return 0 if found.ok else 1
