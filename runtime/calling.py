"""From the caller's arguments to the graph's flat inputs, and back to the caller's result.

Two kinds of call: ``ModuleCall`` for any module (the captured arguments, by name and structure),
and ``CausalCall`` for causal language models (ids, mask, positions and a key/value cache, all
optional but the ids, as in transformers). Both are plain JSON-able data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadCheckpoint, NotCaptured, did_you_mean
from sparsify.runtime.trees import Tree, UnknownStructure, describe, leaf_names, rebuild

Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One flat input of the graph.

    Attributes:
        name: the placeholder's name.
        shape: its sizes; None where any size (up to ``limits``) is covered.
        limits: largest size the graph covers, where it is known and finite.
        floating: whether it holds floating point numbers.
    """

    name: str
    shape: tuple[int | None, ...]
    limits: tuple[int | None, ...] = ()
    floating: bool = False

    @functools.cached_property
    def _plan(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(dimension, size) of what is fixed, and of what is limited."""
        fixed = [(axis, size) for axis, size in enumerate(self.shape) if size is not None]
        limits = self.limits[: len(self.shape)]
        return fixed, [(axis, most) for axis, most in enumerate(limits) if most is not None]

    def check(self, tensor: Tensor) -> None:
        """Raise NotCaptured where ``tensor`` is not covered."""
        sizes = tensor.shape
        fixed, capped = self._plan  # dozens of cached tensors pass here for every decoded token
        fits = len(sizes) == len(self.shape)
        for axis, size in fixed:
            fits = fits and sizes[axis] == size
        if not fits:
            have, covered = _sizes(tuple(sizes)), _sizes(self.shape)
            raise NotCaptured(
                f"'{self.name}' has shape {have}, the graph covers {covered}",
                why="sizes shown as numbers were fixed when the model was captured",
                help="capture again with an example of this shape",
            )
        for axis, most in capped:
            if sizes[axis] > most:
                size = sizes[axis]
                raise NotCaptured(
                    f"'{self.name}' has size {size} in dimension {axis}; the graph covers {most}",
                    why="the model behaves differently beyond that size",
                    help="capture again with a longer example",
                )
        if tensor.is_floating_point() != self.floating:
            kind = "floating point" if self.floating else "integer or boolean"
            raise NotCaptured(f"'{self.name}' must be {kind}, not {tensor.dtype}")


def _sizes(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """Call of a module whose arguments were captured by name.

    Attributes:
        slots: the graph's flat inputs.
        parameters: the forward's parameter names in order (``*name`` for a variadic one,
            ``**name`` for keywords).
        captured: parameter -> tree of what the example gave.
        output: tree of the result.
        model: the model's class name, for messages.
    """

    kind: ClassVar[str] = "module"
    slots: tuple[Slot, ...]
    parameters: tuple[str, ...]
    captured: dict[str, Tree]
    output: Tree
    model: str = "model"

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Flat graph inputs, or NotCaptured."""
        given = self._bind(args, kwargs)
        leaves: list[Tensor] = []
        for name, tree in self.captured.items():
            missing = object()
            value = given.pop(name, missing)
            if value is missing:
                if leaf_names(tree, name):
                    raise NotCaptured(
                        f"{self.model} needs '{name}'",
                        why="the graph was captured with it",
                        help=f"pass {name}=...",
                    )
                continue
            self._match(name, value, tree, leaves)
        for name, value in given.items():
            # False asks for nothing extra either (output_attentions=False and the like).
            if value is not None and value is not False and value != ():
                raise NotCaptured(
                    f"the graph was captured without '{name}'",
                    help=f"compile again with an example that passes {name}",
                )
        for slot, leaf in zip(self.slots, leaves, strict=True):
            slot.check(leaf)
        return leaves

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """The result as the dense model returned it."""
        return rebuild(self.output, outputs)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        plain = [name for name in self.parameters if not name.startswith("*")]
        variadic = next((n[1:] for n in self.parameters if n.startswith("*") and n[1:2] != "*"), "")
        keywords = any(name.startswith("**") for name in self.parameters)
        before = self.parameters.index(f"*{variadic}") if variadic else len(plain)
        given.update(zip(plain[:before], args, strict=False))
        if len(args) > before:
            if not variadic:
                raise NotCaptured(f"{self.model} takes {before} arguments, {len(args)} were given")
            given[variadic] = tuple(args[before:])
        for name, value in kwargs.items():
            if name in given:
                raise NotCaptured(f"'{name}' was given twice")
            if name not in plain and name not in self.captured:
                if keywords and value is None:
                    continue
                raise NotCaptured(
                    f"{self.model} has no captured argument '{name}'",
                    help=did_you_mean(name, [*plain, *self.captured])
                    or f"arguments: {', '.join(self.captured)}",
                )
            given[name] = value
        return given

    def _match(self, name: str, value: Any, tree: Tree, leaves: list[Tensor]) -> None:
        try:
            mine: list[Tensor] = []
            found = describe(value, mine)
        except UnknownStructure as error:
            raise NotCaptured(f"'{name}' holds {error}") from error
        if found != tree:
            fixed = tree["kind"] == "value"
            raise NotCaptured(
                f"'{name}' is {value!r}, the graph was captured with {tree['value']!r}"
                if fixed and found["kind"] == "value"
                else f"'{name}' is laid out otherwise than when the model was captured",
                help=f"compile again with an example that passes this {name}",
            )
        leaves.extend(mine)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class CausalCall:
    """Call of a causal language model with an optional key/value cache.

    Attributes:
        slots: ``input_ids`` (B, T), ``attention_mask`` (B, P+T) where the model takes one,
            ``position_ids`` (B, T) where it takes one, then key and value (B, G, P, d) per layer.
        positions: how positions follow when the caller gives none: ``arange`` (P, P+1, ...),
            ``mask-cumsum`` (count of unmasked tokens before), or None where the graph takes none.
        pad_position: the position that ``mask-cumsum`` gives to padding.
        masked: whether the graph takes ``attention_mask``.
        layers: (kv heads, key width, value width) per cached layer; empty without a cache.
        vocabulary: width of the logits.
        result: output class of the dense model, ``module:Class``.
        dtype: floating dtype at capture: that of an empty cache, unless said otherwise.
    """

    kind: ClassVar[str] = "causal-lm"
    slots: tuple[Slot, ...]
    positions: str | None
    masked: bool
    layers: tuple[tuple[int, int, int], ...]
    vocabulary: int
    pad_position: int = 0
    model: str = "model"
    result: str = ""
    dtype: str = "float32"

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Flat graph inputs from ``input_ids, attention_mask, position_ids, past_key_values``."""
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        unknown = [name for name in given if name not in names]
        if unknown or "input_ids" not in given:
            raise NotCaptured(
                f"the graph takes {', '.join(names)}"
                + (f", not {', '.join(unknown)}" if unknown else "; input_ids are missing")
            )
        return self.inputs(*(given.get(name) for name in names))

    def inputs(
        self,
        input_ids: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Pairs | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Flat graph inputs; what the caller leaves out follows from the rules above.

        Args:
            dtype: dtype of an empty cache; None = the captured one.
        """
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            shape = _sizes(tuple(input_ids.shape)) if isinstance(input_ids, Tensor) else "no tensor"
            raise NotCaptured(f"input_ids must be (batch, tokens), got {shape}")
        batch, tokens = input_ids.shape
        device = input_ids.device
        if past is None:
            past = self.empty_cache(batch, dtype or getattr(torch, self.dtype), device)
        if len(past) != len(self.layers):
            raise NotCaptured(
                f"the cache has {len(past)} layers, the graph {len(self.layers)}",
                help="" if self.layers else "this model was captured without a cache",
            )
        before = past[0][0].shape[2] if past else 0
        flat = [input_ids]
        if self.masked:
            if attention_mask is None:
                attention_mask = torch.ones(
                    batch, before + tokens, dtype=torch.int64, device=device
                )
            if tuple(attention_mask.shape) != (batch, before + tokens):
                raise NotCaptured(
                    f"attention_mask has shape {_sizes(tuple(attention_mask.shape))}, "
                    f"needed is (batch, cached + new tokens) = {(batch, before + tokens)}",
                    why="the graph builds its own causal mask from a two-dimensional padding mask",
                )
            flat.append(attention_mask.to(torch.int64))
        if self.positions is not None:
            if position_ids is None:
                position_ids = self._positions(attention_mask, batch, before, tokens, device)
            if position_ids.shape[0] != batch:
                position_ids = position_ids.expand(batch, -1)
            flat.append(position_ids)
        for key, value in past:
            flat += [key, value]
        for slot, tensor in zip(self.slots, flat, strict=True):
            slot.check(tensor)
        return flat

    def unflatten(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits (B, T, V) and the grown cache."""
        logits, *cache = outputs
        return logits, list(zip(cache[::2], cache[1::2], strict=True))

    def empty_cache(
        self, batch: int, dtype: torch.dtype, device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of no tokens."""
        return [
            (
                torch.empty(batch, heads, 0, key, dtype=dtype, device=device),
                torch.empty(batch, heads, 0, value, dtype=dtype, device=device),
            )
            for heads, key, value in self.layers
        ]

    def _positions(
        self, mask: Tensor | None, batch: int, before: int, tokens: int, device: torch.device
    ) -> Tensor:
        if self.positions == "mask-cumsum" and mask is not None:
            return mask_positions(mask, self.pad_position)[:, -tokens:]
        row = torch.arange(before, before + tokens, device=device)
        return row[None].expand(batch, tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


CallSpec = ModuleCall | CausalCall


def mask_positions(mask: Tensor, pad_position: int) -> Tensor:
    """Positions counted over unmasked tokens; padding gets ``pad_position``."""
    mask = mask.to(torch.int64)
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, pad_position)


def call_from_json(data: Mapping[str, Any]) -> CallSpec:
    """The call that :meth:`to_json` wrote; BadCheckpoint where it is malformed."""
    try:
        fields = {key: value for key, value in data.items() if key != "kind"}
        fields["slots"] = tuple(
            Slot(s["name"], tuple(s["shape"]), tuple(s["limits"]), bool(s["floating"]))
            for s in data["slots"]
        )
        if data["kind"] == ModuleCall.kind:
            return ModuleCall(**{**fields, "parameters": tuple(fields["parameters"])})
        if data["kind"] == CausalCall.kind:
            layers = tuple((int(a), int(b), int(c)) for a, b, c in fields["layers"])
            return CausalCall(**{**fields, "layers": layers})
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint("the call of the saved model is malformed", why=repr(error)) from error
    raise BadCheckpoint(f"the saved model has an unknown kind of call '{data['kind']}'")
