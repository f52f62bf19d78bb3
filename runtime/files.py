"""Folders written whole or not at all, and files read with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify.errors import BadCheckpoint, OutputError


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, marker: str, force: bool) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write into; it takes the name ``path`` at the end.

    On any error nothing is left behind and an old folder stays as it was.

    Args:
        marker: a file that a folder of this kind holds; ``force`` replaces no other folder.
    """
    target = Path(path).absolute()
    _check_target(target, marker, force)
    token = uuid.uuid4().hex[:8]
    fresh = target.with_name(f".{target.name}.{token}.tmp")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        _swap(fresh, target, target.with_name(f".{target.name}.{token}.old"))
    except OSError as error:
        raise OutputError(
            f"cannot write {target}", why=error.strerror or str(error), help="nothing was changed"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_target(target: Path, marker: str, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file", help="name a folder")
    empty = not any(target.iterdir())
    if empty:
        return
    if not force:
        raise OutputError(f"{target} exists already", help="choose another name, or force it")
    if not (target / marker).exists():
        raise OutputError(
            f"{target} is not a saved sparse model, so it is not replaced",
            help="choose another name, or remove it yourself",
        )


def _swap(fresh: Path, target: Path, aside: Path) -> None:
    """``fresh`` becomes ``target``; an old target goes only once the new one is in place."""
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it; OSError leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """JSON without NaN (which is not JSON), one line per top-level item."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The file's JSON, or BadCheckpoint."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path} is missing", help="save the model again") from error
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read", why=str(error)) from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path} is not readable JSON", why=str(error), help="the file is damaged: save again"
        ) from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
