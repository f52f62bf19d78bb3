"""Capture: a model and an example become one graph with the model's own names and source lines.

``capture(model)`` runs torch.export (non-strict, dynamic batch and sequence, no decompositions) in
eval mode and leaves the model as it was. The graph has flat tensor inputs and outputs; ``call``
says how the caller's arguments map to them. Golden outputs are the dense model's own, and the graph
is checked against them before anything else happens.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.capture.causal import capture_causal, is_causal_lm
from sparsify.capture.export import Exported
from sparsify.capture.inputs import given, natural
from sparsify.capture.plain import capture_module, capture_program
from sparsify.errors import BadInput, BadWeights, CaptureFailed, ModelNotFound, ModelUnreadable
from sparsify.runtime.calling import CallSpec
from sparsify.runtime.graph import placement

__all__ = ["Capture", "capture"]


@dataclasses.dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        graph: flat placeholders, flat tuple output, plain code; parameters named as in the model.
        call: how the caller's arguments become flat inputs, and outputs the caller's result.
        example: flat inputs; golden: the dense model's outputs on them.
        kind: ``causal-lm`` or ``module``.
        notes: what was lost (a fixed size, no cache), one line each.
        dtype: the model's floating dtype.
        source: the model that was captured, untouched; its config and class serve the result.
        shared: whether the graph's parameters are the caller's own.
    """

    graph: fx.GraphModule
    call: CallSpec
    example: tuple[Tensor, ...]
    golden: tuple[Tensor, ...]
    kind: str
    notes: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    source: Any = dataclasses.field(default=None, repr=False)
    shared: bool = True

    @property
    def dynamic(self) -> tuple[tuple[bool, ...], ...]:
        """Per flat input and dimension: whether any size is covered."""
        return tuple(tuple(size is None for size in slot.shape) for slot in self.call.slots)


def capture(
    model: Any, example: Any = None, *, share: bool = True, dynamic: bool = True
) -> Capture:
    """Capture ``model`` as a graph.

    Args:
        model: an ``nn.Module`` (transformers and diffusers models included), a
            ``torch.fx.GraphModule``, an ``ExportedProgram``, or the path of a ``.pt2`` file.
        example: a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs).
            transformers models need none.
        share: use the model's own parameters (no copy); False copies them.
        dynamic: let batch and sequence take any size.

    Raises:
        CaptureFailed: with the line of the model that broke, and what to try.
        BadWeights: the weights hold NaN or infinity.
    """
    if isinstance(model, str | Path):
        model = _load_program(Path(model))
    if isinstance(model, torch.export.ExportedProgram):
        _check_weights(dict(model.state_dict))
        return _finish(*capture_program(model if share else copy.deepcopy(model)), None, share)
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"a {type(model).__name__} cannot be captured",
            help="pass an nn.Module, an ExportedProgram or the path of a .pt2 file",
        )
    _check_weights(dict(model.named_parameters()))
    if any(t.is_meta for t in model.parameters()):
        raise CaptureFailed(
            f"{type(model).__name__} has weights without values (on the meta device)",
            help="load the weights before compiling",
        )
    if not share:
        model = copy.deepcopy(model)
    if is_causal_lm(model, example):
        return _finish(*capture_causal(model, example, dynamic), model, share)
    args, kwargs = given(example) if example is not None else ((), natural(model))
    return _finish(*capture_module(model, args, kwargs, dynamic), model, share)


def _finish(
    exported: Exported,
    call: CallSpec,
    example: tuple[Tensor, ...],
    golden: tuple[Tensor, ...],
    source: Any,
    shared: bool,
) -> Capture:
    dtype = placement(exported.graph)[0] or torch.float32
    exported.graph.meta["dtype"] = dtype
    notes = exported.notes
    return Capture(exported.graph, call, example, golden, call.kind, notes, dtype, source, shared)


def _load_program(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise ModelNotFound(f"no such file: {path}")
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelUnreadable(
            f"{path} is not a readable exported program",
            why=f"{type(error).__name__}: {error}",
            help="write it with torch.export.save, with the torch version used here",
        ) from error


def _check_weights(named: dict[str, Tensor]) -> None:
    bad = []
    for name, tensor in named.items():
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # NaN and infinity survive a sum; a half-precision sum may overflow without them.
        if not bool(tensor.detach().sum().isfinite()) and not bool(tensor.isfinite().all()):
            bad.append(name)
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise BadWeights(
            f"the weights hold NaN or infinity: {shown}",
            why="nothing can be proved about such a model",
            help="load the checkpoint again, or find the step of training that broke it",
        )
