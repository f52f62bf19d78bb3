"""Models of the Hugging Face formats: folders, cached hub ids, GGUF files, diffusers folders."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import (
    BadInput,
    MissingDependency,
    ModelNotFound,
    ModelUnreadable,
    did_you_mean,
)
from sparsify.models import FORMS, MANIFEST, PICKLES, Loaded

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16", "float64")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "tokenizer.model",
)  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """``float32`` -> ``torch.float32``; raises BadInput."""
    import torch

    if name not in DTYPES:
        hint = did_you_mean(name, DTYPES)
        raise BadInput(
            f"no dtype '{name}'", help=f"{hint + '  ' if hint else ''}one of: {', '.join(DTYPES)}"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or progress bars of libraries inside; as before after it."""
    names = ("transformers", "diffusers", "torch.export", "gguf")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars: Any = None
    if importlib.util.find_spec("transformers") is not None:
        from transformers.utils import logging as bars
    shown = bars is not None and bars.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if shown:
            bars.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def hub(name: str, dtype: str | None, allow_pickle: bool) -> Loaded:
    """A model of the hub that is in the local cache; nothing is downloaded."""
    _need("transformers", name)
    from huggingface_hub import try_to_load_from_cache

    config = None
    with contextlib.suppress(ValueError):  # not a legal repository id
        config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        if "/" in name:
            raise ModelNotFound(
                f"'{name}' is neither a folder nor a cached hub model",
                why="sparsify does not download",
                help=f"hf download {name}   (where there is a network)",
            )
        from sparsify import zoo

        known = [*(f"zoo:{n}" for n in zoo.names()), "smollm2", "minilm"]
        hint = did_you_mean(name, known) or did_you_mean(f"zoo:{name}", known)
        raise ModelNotFound(f"no model '{name}'", help=f"{hint}\n{FORMS}" if hint else FORMS)
    return folder(Path(config).parent, dtype, allow_pickle, name=name)


def folder(path: Path, dtype: str | None, allow_pickle: bool, *, name: str) -> Loaded:
    """A folder with config.json and weights."""
    config = _config(path)
    if "_class_name" in config:
        return _diffusers(path, config, dtype, name=name)
    _need("transformers", name)
    _check_weights(path, allow_pickle)
    import transformers

    wanted = next(iter(config.get("architectures") or ()), None)
    cls = getattr(transformers, str(wanted), None)
    known = config.get("model_type") in transformers.CONFIG_MAPPING
    if cls is None and not known:
        raise ModelUnreadable(
            f"{path} is a model of an unknown architecture: {wanted or config.get('model_type')}",
            why=f"transformers {transformers.__version__} does not define it"
            + (", and code from the model's folder is not run" if "auto_map" in config else ""),
            help="build the model in a function of yours and pass module:function",
        )
    exact = cls is not None
    cls = cls or transformers.AutoModel
    try:
        with quiet():
            model, info = cls.from_pretrained(
                path,
                dtype=torch_dtype(dtype) if dtype else "auto",
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=None if allow_pickle else True,
            )
    except Exception as error:
        raise ModelUnreadable(
            f"{path} cannot be loaded", why=_why(error), help="save the model again"
        ) from error
    notes = _missing(path, sorted(info.get("missing_keys") or ()), exact, type(model).__name__)
    tokenizer, more = tokenizer_of(path)
    return Loaded(model.eval(), tokenizer, None, name, "hf", (*notes, *more))


def gguf(file: Path, dtype: str | None, *, name: str) -> Loaded:
    """A GGUF file, dequantised."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelUnreadable(f"{file} is not a GGUF file", help="download or copy it again")
    _need("transformers", name)
    _need("gguf", name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # the bar of dequantising heeds no setting of transformers
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch_dtype(dtype or "float32")
            )
    except Exception as error:
        raise ModelUnreadable(
            f"{file} cannot be loaded",
            why=_why(error),
            help="the file may be cut off: compare its size with the original's; or its\n"
            "architecture is one that transformers does not read from GGUF",
        ) from error
    _forget_quantisation(model)
    notes: tuple[str, ...] = ()
    tokenizer = None
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        notes = (f"the tokenizer in {file.name} cannot be read: {_why(error)}",)
    return Loaded(model.eval(), tokenizer, None, name, "gguf", notes)


def tokenizer_of(path: Path) -> tuple[Any | None, tuple[str, ...]]:
    """(tokenizer or None, notes) of a folder."""
    if not any((path / file).exists() for file in _TOKENIZER_FILES):
        return None, ()
    if importlib.util.find_spec("transformers") is None:
        return None, ("the tokenizer needs transformers: pip install transformers",)
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, local_files_only=True), ()
    except Exception as error:
        return None, (f"the tokenizer in {path} cannot be read: {_why(error)}",)


def _forget_quantisation(model: nn.Module) -> None:
    """The weights are plain floats now; ``save_pretrained`` refuses while the config says else."""
    holders: tuple[Any, ...] = (model.config, getattr(model, "generation_config", None))
    for holder in holders:
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    loaded: Any = model
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    loaded.quantization_method = None


def _diffusers(path: Path, config: dict[str, Any], dtype: str | None, *, name: str) -> Loaded:
    _need("diffusers", name)
    import diffusers

    cls: Any = getattr(diffusers, str(config["_class_name"]), None)
    if cls is None:
        raise ModelUnreadable(
            f"{path} is a model of an unknown class: {config['_class_name']}",
            why=f"diffusers {diffusers.__version__} does not define it",
        )
    _check_weights(path, allow_pickle=False)
    try:
        with quiet():
            model = cls.from_pretrained(
                path, torch_dtype=torch_dtype(dtype) if dtype else None, use_safetensors=True
            )
    except Exception as error:
        raise ModelUnreadable(f"{path} cannot be loaded", why=_why(error)) from error
    return Loaded(model.eval(), None, None, name, "diffusers")


# ---------------------------------------------------------------------------- checks


def _need(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(f"{name} needs {package}", help=f"pip install {package}")


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnreadable(
            f"{path / 'config.json'} cannot be read", why=str(error), help="save the model again"
        ) from None
    if not isinstance(config, dict):
        raise ModelUnreadable(f"{path / 'config.json'} is no model's configuration")
    return config


def _check_weights(path: Path, allow_pickle: bool) -> None:
    """Every weight file is there and whole, and none has to be unpickled."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    for index in path.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelUnreadable(f"{index} cannot be read", why=str(error)) from None
        if missing := sorted(n for n in named if not (path / n).exists()):
            raise ModelUnreadable(
                f"{path} is incomplete: {missing[0]} is missing",
                why=f"{len(missing)} of {len(named)} weight files are not there",
                help="download or copy the model again",
            )
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelUnreadable(
                f"{file} is damaged", why=str(error), help="download or copy the model again"
            ) from None
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES]
    pickles = [p for p in pickles if p != "training_args.bin"]
    if files or (pickles and allow_pickle):
        return
    if pickles:
        raise ModelUnreadable(
            f"{path} holds its weights as a pickle ({pickles[0]}), which is not read",
            why="a pickle can run any code when it is read",
            help="save it as safetensors where you trust it: model.save_pretrained(folder);\n"
            "sparsify.models.load(path, allow_pickle=True) reads it in Python",
        )
    if (path / MANIFEST).exists():
        return
    raise ModelNotFound(
        f"{path} holds a configuration but no weights", help="expected *.safetensors in it"
    )


def _missing(path: Path, keys: list[str], exact: bool, built: str) -> tuple[str, ...]:
    """Weights that the files lack are random: an error, or a note where the class is a guess."""
    if not keys:
        return ()
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    if exact:
        raise ModelUnreadable(
            f"{path} lacks {len(keys)} weights of its {built}",
            why=f"they would be random: {shown}",
            help="download or copy the model again",
        )
    return (f"{len(keys)} weights are not in the files and are random: {shown}",)


def _why(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
