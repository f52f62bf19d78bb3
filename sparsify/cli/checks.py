"""What can be told about the arguments before torch loads, so that a slip costs no waiting."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from sparsify import registry
from sparsify.errors import (
    BadCheckpoint,
    BadInput,
    MissingDependency,
    ModelNotFound,
    OutputError,
    did_you_mean,
)
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
            f"{option} cannot be {value:g}",
            why="it is the fraction of units that a token uses",
            help=f"0 < {option} <= 1",
        )


def fractions(option: str, text: str) -> tuple[float, ...]:
    """Budgets written as ``1,0.75,0.5``."""
    found = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise BadInput(f"{option} takes numbers such as 1,0.75,0.5, not '{text}'") from None
        fraction(option, found[-1])
    return tuple(found)


def counts(option: str, text: str) -> tuple[int, ...]:
    """Counts written as ``1,8,64``."""
    found = []
    for word in text.split(","):
        try:
            found.append(int(word))
        except ValueError:
            raise BadInput(f"{option} takes counts such as 1,8,64, not '{text}'") from None
        at_least(option, found[-1], 1)
    return tuple(found)


def at_least(option: str, value: int, least: int) -> None:
    """Refuse a count that is too small."""
    if value < least:
        raise BadInput(f"{option} cannot be {value}", help=f"at least {least}")


def among(option: str, value: str | None, legal: Sequence[str]) -> None:
    """Refuse a word that is not one of ``legal``."""
    if value is not None and value not in legal:
        raise BadInput(
            f"{option} cannot be '{value}'",
            help=did_you_mean(value, legal) or f"one of: {', '.join(legal)}",
        )


def model(argument: str) -> None:
    """Refuse a model that is plainly not there; ``sparsify.models`` has the last word."""
    if not argument.strip():
        raise BadInput("MODEL is empty", help="a folder, a file, module:function or zoo:NAME")


def saved(path: Path) -> None:
    """Refuse what is not a folder that ``compile`` wrote."""
    if not path.exists():
        raise ModelNotFound(f"no saved model at {path}", help="sparsify compile MODEL -o OUT")
    if not path.is_dir() or not (path / MANIFEST).is_file():
        raise BadCheckpoint(
            f"{path} is not a saved sparse model",
            why=f"it holds no {MANIFEST}" if path.is_dir() else "it is a file",
            help="sparsify compile MODEL -o OUT",
        )


def convertible(path: str, pipeline: str | None) -> bool:
    """Whether ``path`` is a saved sparse model; refuses one with a pipeline, others without."""
    is_saved = (Path(path) / MANIFEST).is_file()
    if is_saved and pipeline is not None:
        raise BadInput(
            f"{path} is a sparse model: it takes no pipeline",
            help="leave -p out, or name the dense model",
        )
    if not is_saved and pipeline is None:
        raise BadInput(
            f"{path} is a dense model: it needs a pipeline" if path else "MODEL is empty",
            help="-p 'ffn-moe', or name a folder that sparsify compile wrote",
        )
    return is_saved


def file(option: str, path: Path | None) -> None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise BadInput(f"{option} {path} is {'a folder' if path.is_dir() else 'not there'}")


def text(source: str | None) -> None:
    """Refuse a text that is neither a built-in kind nor a readable file."""
    if source is None:
        return
    from sparsify import corpus

    if source not in corpus.KINDS:
        corpus.check_text(source)


def questions(path: Path | None) -> None:
    """Refuse a file whose first lines are no multiple-choice questions."""
    if path is not None:
        from sparsify import questions as files

        files.check(path)


def output_folder(path: Path, *, force: bool) -> None:
    """Refuse a folder for a saved model that is taken (without ``force``) or cannot be made."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", help="name a folder")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise OutputError(f"{path} exists already", help="--force replaces it")
        if not (path / MANIFEST).exists():
            raise OutputError(
                f"{path} is not a saved sparse model, so it is not replaced",
                help="choose another name, or remove it yourself",
            )
    _writable(path)


def output_file(option: str, path: Path | None, *, force: bool) -> None:
    """Refuse a file that is there (without ``force``) or cannot be written; ``-`` is stdout."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder", help="name a file")
    if path.exists() and not force:
        raise OutputError(f"{option} {path} exists already", help="--force replaces it")
    _writable(path)


def graph_folder(option: str, path: Path | None, *, force: bool) -> None:
    """Refuse a folder that holds something already (without ``force``)."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise OutputError(f"{option} {path} is a file", help="name a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise OutputError(
            f"{option} {path} is not empty", help="--force writes into it, beside what is there"
        )
    _writable(path)


def triton(option: str, wanted: object) -> None:
    """Refuse what needs triton where it is not installed."""
    if wanted is not None and importlib.util.find_spec("triton") is None:
        raise MissingDependency(
            f"{option} needs triton, which is not installed",
            help="pip install 'sparsify-fx[triton]'",
        )


def onnx(*, check: bool) -> None:
    """Refuse an export where the extra is not installed."""
    for name in ("onnx", "onnx_ir", "onnxscript", *(["onnxruntime"] if check else [])):
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(
                f"ONNX export needs {name}, which is not installed",
                help="pip install 'sparsify-fx[onnx]'",
            )


def _writable(path: Path) -> None:
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}", why=f"{parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {path}", why=f"{parent} is not writable")
