"""A model written whole or not at all: into a folder beside its place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify.codegen.onnx.custom.files import beside, put
from sparsify.codegen.onnx.needs import need
from sparsify.errors import OutputError

LIMIT = (1 << 31) - (1 << 20)  # protobuf's 2 GiB, less room for the graph
MODEL = "model.onnx"  # its name in a folder for clients
SMALL = 1024  # bytes of a tensor that stays in the graph's own file


def check_place(path: Path, *, force: bool) -> None:
    """OutputError where ``path`` is taken or plainly cannot be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder", help="name a file, such as model.onnx")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already", help="choose another name, or force it")
    _check_parent(path, path.parent)


def _check_parent(path: Path, parent: Path) -> None:
    if not parent.is_dir():
        why = "is not a folder" if parent.exists() else "is not there"
        raise OutputError(f"cannot write {path}", why=f"the folder {parent} {why}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}", why=f"the folder {parent} is not writable")


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is meant: the name ends with a slash, or there is one."""
    text = os.fspath(path)
    return text.endswith(("/", os.sep)) or Path(text).is_dir()


def check_folder(folder: Path, *, force: bool) -> None:
    """OutputError where ``folder`` is taken or plainly cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", help="name a folder, or leave the slash out")
    _check_parent(folder, folder.absolute().parent)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise OutputError(f"{folder} is not empty", help="choose another name, or force it")
    if not (folder / MODEL).exists():
        raise OutputError(
            f"{folder} holds no {MODEL}, so it is not replaced",
            help="choose another name, or remove it yourself",
        )


@contextlib.contextmanager
def writing(model: Any, path: Path, *, external: bool | None, force: bool) -> Iterator[Path]:
    """Write an ``onnx_ir.Model``; inside, the file lies apart, and may still be refused.

    It takes its place at the end; on any error what was there is still there, and nothing else.

    Args:
        external: weights in a file of their own, ``NAME.data``; None = where the model is larger
            than a protobuf may be.

    Raises:
        OutputError: the disk is full or the place not writable.
    """
    check_place(path, force=force)
    with aside(model, path, external=external) as file:
        yield file
        made = sorted(file.parent.iterdir(), key=lambda part: part == file)  # the graph last
        _into_place(made, path.parent, file.parent)
        for part in _parts(path):  # of the file that was replaced
            if part.name not in {file.name for file in made}:
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def aside(model: Any, path: Path, *, external: bool | None = None) -> Iterator[Path]:
    """The model as a file of the same name in a folder beside ``path``, gone afterwards.

    Raises:
        OutputError: as :func:`writing`; for what happens inside, too.
    """
    (ir,) = need("onnx_ir")
    options = _options(model, path, external)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        fresh.mkdir()
        ir.save(model, fresh / path.name, **options)
        put(model, fresh / path.name)
        yield fresh / path.name
    except OSError as error:
        raise OutputError(
            f"cannot write {path}", why=_why(error, path.parent), help="nothing was changed"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _why(error: OSError, folder: Path) -> str:
    """numpy says how much it wrote, not that the disk is full."""
    if error.errno is None and shutil.disk_usage(folder).free < 1 << 20:
        return os.strerror(errno.ENOSPC)
    return error.strerror or str(error)


def write(model: Any, path: Path, *, external: bool | None, force: bool) -> tuple[Path, ...]:
    """:func:`writing` with nothing between; the files that were written."""
    with writing(model, path, external=external, force=force):
        pass
    return files_of(path)


def files_of(path: Path) -> tuple[Path, ...]:
    """The graph's file, then its weights' where they are apart, then its operators'."""
    return (path, *(part for part in _parts(path) if part.exists()))


def _parts(path: Path) -> tuple[Path, ...]:
    return (_data(path), *beside(path))


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _options(model: Any, path: Path, external: bool | None) -> dict[str, Any]:
    size = sum(v.const_value.nbytes for g in model.graphs() for v in g.initializers.values())
    if size <= LIMIT and not external:
        return {}
    if external is False:
        raise OutputError(
            f"{path} cannot hold its weights",
            why=f"a single ONNX file holds 2 GiB at most, the weights are {size / 2**30:.2f} GiB",
            help="write the weights into a file of their own (external_data=True)",
        )
    return {"external_data": _data(path).name, "size_threshold_bytes": SMALL}


def _into_place(made: list[Path], folder: Path, aside: Path) -> None:
    """Rename the files into ``folder``; all is as it was where one cannot be renamed."""
    old: list[tuple[Path, Path]] = []
    new: list[Path] = []
    try:
        for file in made:
            target = folder / file.name
            if target.exists():
                kept = aside / f"{file.name}.old"
                target.rename(kept)
                old.append((kept, target))
            file.replace(target)
            new.append(target)
    except BaseException:
        for target in new:
            target.unlink()
        for kept, target in old:
            kept.replace(target)
        raise
