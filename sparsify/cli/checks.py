"""What can be told about the arguments before torch loads, so that a slip costs no waiting."""

from __future__ import annotations

import os
from pathlib import Path

from sparsify import registry
from sparsify.errors import BadInput, OutputError
from sparsify.text import StageText, parse

MANIFEST = "sparsify.json"  # what marks a folder as a saved sparse model


def pipeline(text: str | None) -> tuple[StageText, ...]:
    """The stages of ``text``, every pass known and every option legal."""
    stages = parse(text) if text is not None else ()
    for stage in stages:
        registry.build(stage)
    return stages


def fraction(option: str, value: float | None) -> None:
    """Refuse a budget outside (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise BadInput(
            f"{option} cannot be {value:g}", why="it is the fraction of units that a token uses",
            help=f"0 < {option} <= 1",
        )


def fractions(option: str, text: str) -> tuple[float, ...]:
    """Budgets written as ``1,0.75,0.5``."""
    found = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise BadInput(
                f"{option} takes numbers such as 1,0.75,0.5, not '{text}'"
            ) from None
        fraction(option, found[-1])
    return tuple(found)


def text_file(option: str, path: Path | None) -> None:
    """Refuse a file that is missing, empty or not text."""
    if path is None:
        return
    if path.is_dir():
        raise BadInput(f"{option} {path} is a folder", help="name a text file")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {option} {path}", why=error.strerror) from None
    if not text.strip():
        raise BadInput(f"{option} {path} is empty", help="a few thousand words of ordinary text")
    try:
        if b"\0" in text:
            raise ValueError("it holds a zero byte")
        text.decode()
    except ValueError as error:
        raise BadInput(
            f"{option} {path} is not text", why=str(error).partition(":")[0], help="UTF-8 is read"
        ) from None


def output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists (without ``force``) or cannot be created."""
    if path.is_symlink() or path.exists():
        if path.is_dir() and not any(path.iterdir()):
            return
        if not force:
            raise OutputError(f"{path} exists already", help="--force replaces it")
        if path.is_dir() and not (path / MANIFEST).exists():
            raise OutputError(
                f"{path} is a folder, but not a saved sparse model: it is not replaced",
                help="choose another output",
            )
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}", why=f"{parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {path}", why=f"{parent} is not writable")


def output_file(option: str, path: Path | None, *, force: bool) -> None:
    """As :func:`output` for a single file, where ``-`` is standard output."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder")
    output(path, force=force)
