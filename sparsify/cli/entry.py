"""From arguments to exit code: every outcome of a run is one clear message, never a traceback.

0 done, 1 a claim failed or a bug of ours, 2 usage or bad input, 3 nothing matched, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from sparsify.errors import BadInput, OutputError, SparsifyError, did_you_mean

INTERRUPTED = 130
PIPE_CLOSED = 141  # 128 + SIGPIPE, as for any program whose reader went away


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Prints errors to stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    shown_as, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        code = _run(args)
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit, Exception) as error:
        code = _failed(error, args)
    finally:
        warnings.formatwarning = shown_as
    return code


def _run(args: list[str]) -> int:
    import typer

    from sparsify.cli.app import app

    for verbs in (
        "build",
        "use",
        "onnx",
        "bench",
        "search",
        "train",
        "about",
    ):  # in the order of --help; an import registers them
        importlib.import_module(f"sparsify.cli.{verbs}")

    if not args:
        _run(["--help"])
        return 2
    command = typer.main.get_command(app)
    try:  # not command.main: its own handling of signals and pipes would come before ours
        with command.make_context("sparsify", list(args)) as context:
            code = command.invoke(context)
    except typer.Exit as end:
        code = end.exit_code
    return code if isinstance(code, int) else 0


def _failed(error: BaseException, args: list[str]) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more on its way out: let that go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    known = _known(error)
    if known is None:
        from sparsify.cli import bug

        known = bug.write(error, args)
    _print_error(known)
    return known.exit_code


def _known(error: BaseException) -> SparsifyError | None:
    """``error`` as one of our user errors, or None where it is a bug."""
    if isinstance(error, SparsifyError):
        return error
    if hasattr(error, "format_message"):  # the usage errors of typer's click, whichever it brings
        return _usage(error)
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return BadInput(
            "out of memory",
            why=str(error).strip().partition("\n")[0] or None,
            help="a smaller model, a smaller --dtype or less calibration text needs less",
        )
    if isinstance(error, OSError) and error.errno in (28, 30, 122):  # full, read-only, quota
        return OutputError(f"cannot write: {error.strerror}", where=_file(error))
    return None


def _usage(error: Any) -> SparsifyError:
    message = re.split(r" \(Possible| Did you mean", str(error.format_message()))[0].rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "sparsify"
    hint = None
    if message.startswith("No such command") and context is not None:
        hint = did_you_mean(message.split("'")[1], context.command.commands)
    elif possible := getattr(error, "possibilities", None):
        hint = f"did you mean {sorted(possible)[0]}?  ({path} --help)"
    what = message[:1].lower() + message[1:]
    return BadInput(what, help=hint or f"{path} --help")


def _out_of_memory(error: BaseException) -> bool:
    # torch is not imported here: its out-of-memory errors are told by name and text
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "allocate memory" in text
    )


def _file(error: OSError) -> str | None:
    return f"--> {error.filename}" if error.filename else None


def _print_error(error: SparsifyError) -> None:
    text = error.render()
    if wants_colour(sys.stderr):
        text = text.replace("error:", "\033[1;31merror:\033[0m", 1)
        text = text.replace("\n  help:", "\n  \033[1;36mhelp:\033[0m")
    print(text, file=sys.stderr)


def wants_colour(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that shows colour, and the user did not turn it off."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as users should see it: what, not where in our source."""
    return f"warning: {message}\n"
