"""Example inputs: the caller's in any usual form, or natural ones for transformers models.

Natural inputs follow from ``main_input_name``, the forward's signature and the sizes in the config;
no architecture is named.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadInput, CaptureFailed

BATCH = 2
TOKENS = 8


def of_class(model: object, library: str, *names: str) -> bool:
    """Whether ``model`` is an instance of ``library``'s class, without importing the library."""
    module = sys.modules.get(library)
    classes = tuple(c for name in names if (c := getattr(module, name, None)) is not None)
    return bool(classes) and isinstance(model, classes)


def is_transformers(model: object) -> bool:
    """Whether ``model`` is a transformers model."""
    return of_class(model, "transformers", "PreTrainedModel")


def given(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments from what a user passes as ``example``."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), {str(key): value for key, value in example.items()}
    if isinstance(example, tuple | list):
        pair = len(example) == 2 and isinstance(example[0], tuple | list)
        if pair and isinstance(example[1], Mapping):
            return tuple(example[0]), {str(k): v for k, v in example[1].items()}
        return tuple(example), {}
    raise BadInput(
        f"an example cannot be a {type(example).__name__}",
        help="a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs)",
    )


def natural(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that ``model`` runs on, or CaptureFailed asking for an example."""
    if is_transformers(model):
        return _transformers(model)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        return {str(key): value for key, value in dummy.items()}
    raise CaptureFailed(
        f"{type(model).__name__} needs an example input to be captured",
        why="there is no telling what its forward takes",
        help="pass example=tensor, example=(arg, ...) or example={'name': tensor}",
    )


def _transformers(model: Any) -> dict[str, Any]:
    config, main = model.config, model.main_input_name
    signature = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {}
    makers = {
        "input_ids": _ids,
        "pixel_values": _pixels,
        "input_features": _features,
        "input_values": _waves,
    }
    wanted = [main]
    if main == "input_ids" and hasattr(config, "vision_config") and "pixel_values" in signature:
        wanted.append("pixel_values")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in signature:
        makers["decoder_input_ids"] = lambda model: _ids(model)[:, : TOKENS - 3]
        wanted.append("decoder_input_ids")
    for name in wanted:
        if name not in makers:
            raise _needs_example(model, f"it reads '{name}'")
        try:
            made[name] = makers[name](model)
        except (AttributeError, TypeError) as error:
            raise _needs_example(model, f"the config does not tell {name}: {error}") from error
    if "input_ids" in made and "attention_mask" in signature:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    if "use_cache" in signature:
        made["use_cache"] = False
    missing = [
        name
        for name, parameter in signature.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in made
    ]
    if missing:
        raise _needs_example(model, f"it needs {', '.join(missing)}")
    device, dtype = model.device, model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in made.items()
    }


def _needs_example(model: nn.Module, why: str) -> CaptureFailed:
    return CaptureFailed(
        f"no natural inputs for {type(model).__name__}",
        why=why,
        help="pass example={'name': tensor, ...}",
    )


def generator() -> torch.Generator:
    """A seeded generator, so that examples are the same every time and no global state moves."""
    return torch.Generator().manual_seed(0)


def token_ids(vocabulary: int, batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    """Random ids (batch, tokens); the first few of a vocabulary are usually special."""
    low = min(4, vocabulary - 1)
    return torch.randint(low, vocabulary, (batch, tokens), generator=generator())


def vocabulary(model: Any) -> int:
    """Rows of the token embedding (a config may promise more)."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return int(model.config.get_text_config().vocab_size)


def _ids(model: Any) -> Tensor:
    return token_ids(vocabulary(model))


def _pixels(model: Any) -> Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.randn(BATCH, channels, height, width, generator=generator())


def _features(model: Any) -> Tensor:
    config = model.config
    # Whisper's encoder halves the frames once, and insists on the full length.
    frames = 2 * config.max_source_positions
    return torch.randn(BATCH, config.num_mel_bins, frames, generator=generator())


def _waves(model: Any) -> Tensor:
    return torch.randn(BATCH, 4000, generator=generator())
