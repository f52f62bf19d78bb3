"""The transformers shell: a sparse model that still is what the user had.

``wrap`` turns a SparseModel into an instance of a subclass of (SparseModel, the original class),
with its config, its ``generate()``, its forward signature and its output classes, but none of its
dense submodules. transformers is imported only when a shell is made.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import BadCheckpoint, BadInput, MissingDependency, NotCaptured
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.files import read_json
from sparsify.runtime.model import SparseModel
from sparsify.runtime.trees import record

REMOTE_CODE = "modeling_sparsify.py"
_REMOTE_CODE = '''"""Loads this sparse model (pip install sparsify-fx); written by model.save."""


class SparsifyModel:
    """What transformers' Auto classes find here with trust_remote_code=True."""

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        """Nothing to register: the class of the result is made on loading."""

    @classmethod
    def from_pretrained(cls, path, *args, dtype=None, torch_dtype=None, **kwargs):
        """The sparse model saved in ``path``."""
        try:
            import sparsify
        except ImportError as error:
            raise ImportError("this model needs sparsify: pip install sparsify-fx") from error
        model = sparsify.load(path)
        dtype = dtype if dtype is not None else torch_dtype
        return model if dtype is None or dtype == "auto" else model.to(dtype)
'''


# ---------------------------------------------------------------------------- making a shell


def wrap(model: SparseModel, source: nn.Module) -> SparseModel:
    """``model`` as an instance of ``source``'s class; unchanged if that is no transformers model.

    ``source`` is left alone: its config is copied, its modules are not referred to.
    """
    if not is_pretrained(source):
        return model
    dense: Any = type(source)
    shell: Any = _shell_class(dense)
    made: Any = shell.__new__(shell)
    plain = nn.Module().__dict__.keys()
    for name, value in source.__dict__.items():
        if name not in plain and not isinstance(value, nn.Module):
            made.__dict__[name] = value
    made.__dict__.update(model.__dict__)
    for name in ("config", "generation_config"):
        if getattr(source, name, None) is not None:
            made.__dict__[name] = copy.deepcopy(getattr(source, name))
    call = model.call_spec
    if isinstance(call, CausalCall) and not call.layers:
        made.config.use_cache = made.generation_config.use_cache = False
    made.__dict__["_dense_class"] = type(source)
    made.__dict__["_embedding_paths"] = {
        name: _path_of(source, name) for name in ("get_input_embeddings", "get_output_embeddings")
    }
    shelled: SparseModel = made
    return shelled


def _path_of(source: Any, getter: str) -> str | None:
    """Where the module that ``source.getter()`` returns lives."""
    try:
        wanted = getattr(source, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in source.named_modules() if module is wanted), None)


def attach(model: SparseModel, path: str | os.PathLike[str]) -> SparseModel:
    """The shell for a model loaded from ``path``, where it came from transformers."""
    folder = Path(path)
    if not (folder / REMOTE_CODE).exists():
        return model
    try:
        import transformers
    except ImportError:
        return model  # torch and sparsify.runtime are enough to run and generate
    name = read_json(folder / "sparsify.json").get("extras", {}).get("class")
    base = _class_named(str(name))
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise BadCheckpoint(
            f"this transformers has no class '{name}'",
            why=f"transformers {transformers.__version__} is installed",
            help="install a transformers that knows the model, or load it with "
            "sparsify.runtime.checkpoint.load_folder",
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # for the attributes its __init__ sets; no weights are made
        source = base(config)
    if (folder / "generation_config.json").exists():
        source.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return wrap(model, source)


def _class_named(name: str) -> Any:
    """A class of transformers by :func:`_name_of`; None where it has none of that name."""
    import transformers

    module, _, last = name.rpartition(".")
    if not module:
        return getattr(transformers, name, None)
    if not module.startswith("transformers.models."):
        return None  # a file names no code but the library's
    try:
        return getattr(importlib.import_module(module), last, None)
    except ImportError:
        return None


def _name_of(cls: type) -> str:
    """The name that ``transformers`` exports, else with the module (``WhisperEncoder``, say)."""
    import transformers

    public = getattr(transformers, cls.__name__, None) is cls
    return cls.__name__ if public else f"{cls.__module__}.{cls.__qualname__}"


def is_pretrained(model: object) -> bool:
    """Whether ``model`` is a transformers model (which then is imported already)."""
    import sys

    library = sys.modules.get("transformers")
    cls = getattr(library, "PreTrainedModel", None)
    return isinstance(cls, type) and isinstance(model, cls)


def load_transformers() -> Any:
    """The transformers library, or MissingDependency with the line that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(
            "transformers is not installed", help="pip install transformers"
        ) from error
    return transformers


@functools.cache
def _shell_class(base: Any) -> type[SparseModel]:
    def forward(self: HfShell, *args: Any, **kwargs: Any) -> Any:
        return self.call_like_dense(args, kwargs)

    # generate(), Trainer and pipelines read the signature to know what they may pass.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    body: dict[str, Any] = {"forward": forward, "__module__": __name__, "__doc__": base.__doc__}
    if hasattr(base, "generate"):
        body["generate"] = _checked_generate(base)
    made: type[SparseModel] = type(f"Sparse{base.__name__}", (HfShell, base), body)
    return made


def _checked_generate(base: Any) -> Any:
    @functools.wraps(base.generate)
    def generate(self: HfShell, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.call_spec, CausalCall):
            raise NotCaptured(
                f"{base.__name__} was captured for forward calls, not for generate()",
                why="only decoder-only language models are captured with a cache",
            )
        return base.generate(self, *args, **kwargs)

    return generate


# ---------------------------------------------------------------------------- the shell


class HfShell(SparseModel):
    """What every shell adds to SparseModel: transformers' way of calling, caching and saving."""

    supports_gradient_checkpointing = False
    is_gradient_checkpointing = False

    def call_like_dense(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The dense model's forward, on the graph."""
        dense: Any = self.__dict__["_dense_class"]
        signature = inspect.signature(dense.forward)
        try:
            bound = signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise NotCaptured(f"{dense.__name__}: {error}") from error
        given = dict(list(bound.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        if isinstance(self.call_spec, CausalCall):
            return self._call_causal(given)
        return self._call_module(given)

    def _call_module(self, given: dict[str, Any]) -> Any:
        if given.get("labels") is not None:
            raise NotCaptured(
                "the loss of this model was not captured",
                help="compile with an example that passes labels, or compute it from the outputs",
            )
        tuples = given.pop("return_dict", None) is False
        result = SparseModel.forward(self, **given)
        return result.to_tuple() if tuples and hasattr(result, "to_tuple") else result

    def _call_causal(self, given: dict[str, Any]) -> Any:
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        tuples = given.pop("return_dict", None) is False
        use_cache = given.pop("use_cache", None)
        loss_options = {k: given.pop(k) for k in ("num_items_in_batch",) if k in given}
        call = self.call_spec
        assert isinstance(call, CausalCall)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        cache = given.pop("past_key_values", None)
        ids = given.pop("input_ids", None)
        mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
        self.refuse(given)
        if ids is None:
            raise NotCaptured("input_ids are missing", why="the graph starts from token ids")
        if isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim != 2):
            raise NotCaptured(
                "attention_mask must be the padding mask of shape (batch, tokens)",
                why="the graph builds its own causal mask; static caches pass a finished one",
                help="leave cache_implementation out, or set it to 'dynamic'",
            )
        past = read_cache(cache)
        if call.positions is None:
            positions = None  # follows from the mask inside the graph, or the model has none
        logits, grown = self.run_causal(
            ids, mask, positions, past, 0 if labels is not None else keep
        )
        loss = None
        if labels is not None:
            this: Any = self
            loss = this.loss_function(
                logits=logits, labels=labels, vocab_size=call.vocabulary, **loss_options
            )
        if not grown or (not use_cache and cache is None):
            cache = None
        else:
            cache = write_cache(cache, grown)
        items = {"loss": loss, "logits": logits, "past_key_values": cache}
        result = record(call.result, **items)
        return result.to_tuple() if tuples else result

    # -- parts that others ask for

    def get_input_embeddings(self) -> Any:
        """What holds the token embedding's weight; NotCaptured if the graph reads none."""
        return self._embeddings("get_input_embeddings")

    def get_output_embeddings(self) -> Any:
        """What holds the head's weight, or None as in transformers."""
        known = self.__dict__["_embedding_paths"]["get_output_embeddings"]
        return None if known is None else self._embeddings("get_output_embeddings")

    def _embeddings(self, getter: str) -> Any:
        path = self.__dict__["_embedding_paths"][getter]
        try:
            return self.get_submodule(path or "none")
        except AttributeError as error:
            raise NotCaptured(f"the graph has no module for {getter}()") from error

    # -- what transformers offers and a graph cannot do

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Not available."""
        raise NotCaptured(
            "gradient checkpointing is not available on a sparse model",
            why="the model is one graph, without layer modules to recompute",
            help="gradient_checkpointing=False",
        )

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Not available."""
        raise NotCaptured(
            "the vocabulary of a sparse model is fixed",
            help="resize the embeddings of the dense model, then compile it",
        )

    def set_attn_implementation(self, *_: Any, **__: Any) -> None:
        """Not available."""
        raise NotCaptured(
            "the attention implementation is fixed in the graph",
            help="choose it when loading the dense model",
        )

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing to do: tied names hold one parameter already."""

    # -- saving

    def save_pretrained(self, path: str | os.PathLike[str], *_: Any, **options: Any) -> None:
        """As :meth:`save`; replaces an earlier save of a sparse model, as transformers does."""
        if options.get("push_to_hub"):
            raise BadInput("push_to_hub is not available", help="save, then upload the folder")
        self.save(path, force=True)

    def write_extras(self, folder: str) -> dict[str, Any]:
        """Config, generation config, tokenizer, and the code that AutoModel runs to load this."""
        dense: Any = self.__dict__["_dense_class"]
        this: Any = self
        config = copy.deepcopy(this.config)
        auto = "AutoModelForCausalLM" if self.kind == "causal-lm" else "AutoModel"
        stem = REMOTE_CODE.removesuffix(".py")
        config.auto_map = {auto: f"{stem}.SparsifyModel"}
        config.architectures = [dense.__name__]
        config.dtype = self.dtype
        config.save_pretrained(folder)
        if getattr(this, "generation_config", None) is not None:
            this.generation_config.save_pretrained(folder)
        if this.tokenizer is not None:
            this.tokenizer.save_pretrained(folder)
        (Path(folder) / REMOTE_CODE).write_text(_REMOTE_CODE, encoding="utf-8")
        return {"class": _name_of(dense)}


# ---------------------------------------------------------------------------- caches


def read_cache(cache: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values per layer; None for an empty cache. NotCaptured for other kinds of cache."""
    if cache is None:
        return None
    if isinstance(cache, list | tuple):
        return [(pair[0], pair[1]) for pair in cache] or None
    layers = getattr(cache, "layers", None)
    if (
        layers is None
        or type(cache).__name__ != "DynamicCache"
        or getattr(cache, "offloading", False)
    ):
        raise NotCaptured(
            f"a sparse model cannot use a {type(cache).__name__}",
            help="pass a DynamicCache, or leave cache_implementation out",
        )
    pairs = []
    for index, layer in enumerate(layers):
        keys = getattr(layer, "keys", None)
        if not getattr(layer, "is_initialized", False) or keys is None or keys.numel() == 0:
            continue
        seen = getattr(layer, "cumulative_length", keys.shape[-2])
        if getattr(layer, "is_sliding", False) and seen > keys.shape[-2]:
            raise NotCaptured(
                f"layer {index} of the cache has dropped tokens outside its sliding window",
                why="the graph masks the window itself and needs all keys",
                help="start from an empty cache, or from one that the sparse model filled",
            )
        pairs.append((keys, layer.values))
    if pairs and len(pairs) != len(layers):
        raise NotCaptured("only some layers of the cache are filled")
    return pairs or None


def write_cache(cache: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """``cache`` (or a new one) with these keys and values, changed in place as transformers does.

    Sliding layers become full ones: the window is in the graph's mask.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(cache, DynamicCache):
        cache = DynamicCache()
        cache.layers = []
    full = [x for x in cache.layers if type(x) is DynamicLayer]
    if len(full) != len(pairs):
        cache.layers[:] = [DynamicLayer() for _ in pairs]
    for layer, (key, value) in zip(cache.layers, pairs, strict=True):
        layer.keys, layer.values = key, value
        layer.dtype, layer.device = key.dtype, key.device
        layer.is_initialized = True
    return cache
