"""Capture of transformers' causal language models: one graph for prefill, decode and training.

The graph takes ids, a padding mask, positions and the key/value cache as flat tensors, and returns
logits and the grown cache. Which default positions a model uses when the caller gives none is found
by running it on a left-padded example, not by its name.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.capture.export import Exported, compare, evaluating, export, run_flat
from sparsify.capture.failures import failed
from sparsify.capture.inputs import given, is_transformers, token_ids, vocabulary
from sparsify.errors import CaptureFailed
from sparsify.runtime.calling import CausalCall, mask_positions
from sparsify.runtime.trees import remember

PAST = 3  # cached tokens in the example: any size but 0 and 1, which export would fix
_POSITION_CANDIDATES = (("arange", 0), ("mask-cumsum", 0), ("mask-cumsum", 1), ("mask-cumsum", -1))


def is_causal_lm(model: nn.Module, example: Any) -> bool:
    """Whether ``model`` is a decoder-only language model called with token ids."""
    if not is_transformers(model):
        return False
    assert isinstance(model, nn.Module)
    anything: Any = model
    config = anything.config
    if not anything.can_generate() or getattr(config, "is_encoder_decoder", False):
        return False
    if anything.main_input_name != "input_ids" or anything.get_output_embeddings() is None:
        return False
    if example is None:
        return True
    args, kwargs = given(example)
    return len(args) <= 1 and set(kwargs) <= {"input_ids", "attention_mask", "position_ids"}


def capture_causal(
    model: Any, example: Any, dynamic: bool
) -> tuple[Exported, CausalCall, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Export a causal language model; returns graph, call, flat example, golden outputs."""
    ids = _example_ids(model, example)
    with evaluating(model):
        try:
            call, flat, golden, notes = _plan(model, ids)
        except CaptureFailed:
            raise
        except Exception as error:  # user code raises anything
            raise failed(f"{type(model).__name__} does not run on token ids", error) from error
        names = _names(call)
        axes = [[0, 1]] * (len(flat) - 2 * len(call.layers)) + [[0, 2]] * (2 * len(call.layers))

        def run(inner: nn.Module, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            _same_sizes(tensors, call)
            return _forward(inner, call, tensors)

        exported = export(model, run, flat, names, axes if dynamic else [[] for _ in axes])
        _one_past_length(exported.graph)
        call = dataclasses.replace(call, slots=exported.slots)
        compare(model, run_flat(exported.graph, flat), golden, "the example")
        if not any(size is not None for size in call.slots[0].shape):
            _check_prefill(model, call, exported, ids)
    exported = Exported(exported.graph, exported.slots, (*notes, *exported.notes))
    return exported, call, tuple(flat), tuple(golden)


def _example_ids(model: Any, example: Any) -> Tensor:
    """Small (2, T) ids: the caller's first tokens, or random ones."""
    known = vocabulary(model)
    if example is None:
        return token_ids(known, tokens=PAST + 7).to(model.device)
    args, kwargs = given(example)
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise CaptureFailed(
            "the example of a causal language model must be token ids of shape (batch, tokens)",
            help="example=tokenizer('some text', return_tensors='pt')",
        )
    if int(ids.max()) >= known or int(ids.min()) < 0:
        raise CaptureFailed(
            f"the example holds token id {int(ids.max())}, the vocabulary has {known}",
            help="use the tokenizer of this model",
        )
    ids = ids[:2, : PAST + 7].to(model.device)
    ids = ids.repeat(2, 1)[:2]
    while ids.shape[1] < PAST + 2:  # too short to be split into a cached and a new part
        ids = torch.cat([ids, ids], dim=1)
    return ids.contiguous()


# ---------------------------------------------------------------------------- the flat call


def _forward(model: Any, call: CausalCall, flat: Sequence[Tensor]) -> list[Tensor]:
    """Logits and cache of the model's own forward on flat tensors."""
    rest = list(flat[1:])
    kwargs: dict[str, Any] = {"input_ids": flat[0]}
    if call.masked:
        kwargs["attention_mask"] = rest.pop(0)
    if call.positions is not None:
        kwargs["position_ids"] = rest.pop(0)
    if not call.layers:
        return [model(**kwargs, use_cache=False).logits]
    cache = _cache(list(zip(rest[::2], rest[1::2], strict=True)))
    output = model(**kwargs, past_key_values=cache, use_cache=True)
    tensors = [output.logits]
    for layer in output.past_key_values.layers:
        tensors += [layer.keys, layer.values]
    return tensors


def _cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A transformers cache of full layers around these tensors.

    Sliding windows are in the mask that the model builds; layers are filled directly, since a
    lazily initialised layer would leave empty constants of a fixed dtype in the graph.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    cache.layers = []
    for key, value in pairs:
        layer = DynamicLayer()
        layer.keys, layer.values = key, value
        layer.dtype, layer.device = key.dtype, key.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def _names(call: CausalCall) -> list[str]:
    names = ["input_ids"]
    names += ["attention_mask"] if call.masked else []
    names += ["position_ids"] if call.positions is not None else []
    for index in range(len(call.layers)):
        names += [f"past_key_values_{index}_key", f"past_key_values_{index}_value"]
    return names


def _same_sizes(flat: Sequence[Tensor], call: CausalCall) -> None:
    """Tell the tracer which sizes are equal.

    Otherwise every cached tensor has a length of its own, and the arithmetic over them makes the
    capture slower by a third.
    """
    ids = flat[0]
    batch, tokens = ids.shape
    cached = flat[len(flat) - 2 * len(call.layers) :] if call.layers else ()
    past = cached[0].shape[2] if cached else 0
    for tensor in flat[1 : len(flat) - len(cached)]:
        torch._check(tensor.shape[0] == batch)
    if call.masked:
        torch._check(flat[1].shape[1] == past + tokens)
    if call.positions is not None:
        torch._check(flat[1 + call.masked].shape[1] == tokens)
    for tensor in cached:
        torch._check(tensor.shape[0] == batch)
        torch._check(tensor.shape[2] == past)


def _one_past_length(module: fx.GraphModule) -> None:
    """Read the cached length off the first layer only: all layers hold the same tokens.

    torch.export reads every cached tensor's length, with a chain of size arithmetic for each.
    """
    known: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        key: Any = None
        if node.target is torch.ops.aten.sym_size.int:
            source, axis = node.args
            past = isinstance(source, fx.Node) and str(source.target).startswith("past_key_values")
            key = ("past" if past and axis == 2 else source, axis)
        elif node.target in (operator.add, operator.sub, operator.mul):
            key = (
                (node.target, node.args) if isinstance(node.meta.get("val"), torch.SymInt) else None
            )
        if key is None:
            continue
        if key in known:
            node.replace_all_uses_with(known[key])
            module.graph.erase_node(node)
        else:
            known[key] = node
    module.recompile()


# ---------------------------------------------------------------------------- what the model is


def _plan(model: Any, ids: Tensor) -> tuple[CausalCall, list[Tensor], list[Tensor], list[str]]:
    """The call (without slots), a flat example with a filled cache, and the model's outputs."""
    notes: list[str] = []
    takes = inspect.signature(model.forward).parameters
    masked = "attention_mask" in takes
    with torch.no_grad():
        positions, pad = _position_rule(model, ids, takes, masked, notes)
        pairs = _first_cache(model, ids[:, :PAST], notes)
        layers = tuple((int(k.shape[1]), int(k.shape[3]), int(v.shape[3])) for k, v in pairs)
        # Slots are known after export; until then the call only says what is passed.
        probe = model(input_ids=ids[:, :2], use_cache=False)
        call = CausalCall(
            (),
            positions,
            masked,
            layers,
            int(probe.logits.shape[-1]),
            pad,
            type(model).__name__,
            remember(type(probe)),
            str(model.dtype).removeprefix("torch."),
        )
        past = PAST if pairs else 0
        new = ids[:, past:].contiguous()
        mask = torch.ones(new.shape[0], past + new.shape[1], dtype=torch.int64, device=ids.device)
        mask[0, 0] = 0  # one padded token: the mask has to matter
        flat = [new]
        if masked:
            flat.append(mask)
        if positions == "arange":
            row = torch.arange(past, past + new.shape[1], device=ids.device)
            flat.append(row[None].repeat(new.shape[0], 1))
        elif positions == "mask-cumsum":
            flat.append(mask_positions(mask, max(pad, 0))[:, -new.shape[1] :].contiguous())
        for key, value in pairs:
            flat += [key.contiguous(), value.contiguous()]
        golden = _forward(model, call, flat)
    return call, flat, golden, notes


def _first_cache(model: Any, ids: Tensor, notes: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of ``ids`` per layer; empty where the model's cache is of another kind."""
    from transformers.cache_utils import DynamicCache

    kind = "it keeps none"
    try:
        cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        layers = list(getattr(cache, "layers", ()))
        kind = type(layers[0]).__name__ if layers else kind
    except Exception as error:  # caches of another kind fail in many ways
        layers, kind = [], f"{type(error).__name__}: {error}"
    pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in layers]
    plain = all(
        isinstance(k, Tensor) and isinstance(v, Tensor) and k.ndim == v.ndim == 4
        and k.shape[2] == ids.shape[1]
        for k, v in pairs
    )  # fmt: skip
    if not pairs or not plain:
        notes.append(f"captured without a key/value cache ({kind}): generation recomputes the text")
        return []
    return [(k, v) for k, v in pairs if isinstance(k, Tensor) and isinstance(v, Tensor)]


def _position_rule(
    model: Any, ids: Tensor, takes: Mapping[str, Any], masked: bool, notes: list[str]
) -> tuple[str | None, int]:
    """The default positions of the model, found on a left-padded example."""
    if "position_ids" not in takes:
        return None, 0
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :2] = 0
    common = {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if masked else {})
    default = model(**common).logits
    valid = mask.bool()
    scale = float(default[valid].abs().max())
    bound = 256 * torch.finfo(default.dtype).eps * max(scale, 1e-30)
    best: tuple[float, float, str | None, int] | None = None
    for rule, pad in _POSITION_CANDIDATES if masked else _POSITION_CANDIDATES[:1]:
        row = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        position_ids = row if rule == "arange" else mask_positions(mask, pad)
        try:
            logits = model(**common, position_ids=position_ids).logits
        except (IndexError, RuntimeError):
            continue  # position -1 outside an embedding table
        # Tokens first; padding (whose logits nobody reads) only breaks ties.
        error = float((logits - default)[valid].abs().max())
        padding = float((logits - default).abs().nan_to_num(0.0).max())
        if error <= bound and (best is None or (error, padding) < best[:2]):
            best = (error, padding, rule, pad)
    if best is None:
        notes.append("positions follow no known rule when none are given: left to the model")
        return None, 0
    return best[2], best[3]


def _check_prefill(model: Any, call: CausalCall, exported: Exported, ids: Tensor) -> None:
    """The graph at other sizes than it was exported with, called with the defaults."""
    ids = torch.cat([ids, ids.flip(1)[:1]])  # batch 3, no cache, left padding
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    kwargs = {"attention_mask": mask} if call.masked else {}
    with torch.no_grad():
        dense = model(input_ids=ids, **kwargs, use_cache=False).logits
        flat = call.inputs(ids, kwargs.get("attention_mask"))
        ours = run_flat(exported.graph, flat)[0]
    valid = mask.bool() if call.masked else torch.ones_like(mask, dtype=torch.bool)
    compare(model, [ours[valid]], [dense[valid]], "a batch of another size")
