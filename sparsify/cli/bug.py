"""Errors of ours: keep what is needed to see them again in a folder ``sparsify-bug-<digest>``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from sparsify.errors import BadInput, SparsifyBug

COMMAND = "command.json"


def write(error: BaseException, args: Sequence[str]) -> SparsifyBug:
    """The SparsifyBug to show for an unexpected ``error``, after writing its folder."""
    import hashlib
    import traceback

    trace = "".join(traceback.format_exception(error))
    digest = hashlib.sha256(f"{list(args)}{trace}".encode()).hexdigest()[:8]
    folder = _keep(f"sparsify-bug-{digest}", trace, args)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "sparsify" in f.filename] or frames
    return SparsifyBug(
        f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
        where=f"--> {ours[-1].filename}:{ours[-1].lineno}   {ours[-1].line}" if ours else None,
        help=f"{folder} holds the command, the traceback and the versions: please report it\n"
        f"sparsify reproduce {folder}   runs it again",
    )


def _keep(name: str, trace: str, args: Sequence[str]) -> Path:
    import tempfile

    from sparsify.cli import machine

    for parent in (Path(), Path(tempfile.gettempdir())):
        folder = parent / name
        try:
            folder.mkdir(exist_ok=True)
            call = {"args": list(args), "folder": str(Path.cwd())}
            (folder / COMMAND).write_text(json.dumps(call, indent=1) + "\n")
            (folder / "command.txt").write_text(shlex.join(["sparsify", *args]) + "\n")
            (folder / "traceback.txt").write_text(trace)
            (folder / "versions.json").write_text(json.dumps(machine.facts(), indent=1) + "\n")
        except OSError:
            continue
        return folder
    return Path("(no folder could be written)")


def recorded(folder: Path) -> tuple[list[str], Path] | None:
    """The command that a bug folder recorded and where it ran; None where it is no bug folder."""
    file = folder / COMMAND
    if not file.exists():
        return None
    try:
        call = json.loads(file.read_text())
        return [str(a) for a in call["args"]], Path(call["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is damaged", why=str(error)) from None
