"""Selections: which units the routers of a file use, beside those of the model.

Two computations of one model differ by rounding. Where two units score as good as the same, that
is enough to select the other one, and from there on the outputs differ by what a unit gives. So a
file is held to this: it selects as the model does, except at ties; and with its own selection the
model gives what it gives.

Every selection has a name in the file: the value ``PATH.live`` (bool; ``.live.1``, ... for further
calls of one router), PATH being the router's in the graph. A traced graph holds markers there
(:func:`marked`), which :func:`named` replaces by names. :func:`recorded` runs the same forms in
torch, with their own selections or with given ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.codegen.onnx.branches import DOMAIN
from sparsify.codegen.onnx.needs import need
from sparsify.runtime.budget import Budgeted

BLOCKS = "live_blocks"  # a form's own selection, not a router's: scores and more -> bool
_NAMED = re.compile(r"\.live(\.\d+)?$")
Masks = dict[str, Tensor]
Select = Callable[..., Tensor]


@contextlib.contextmanager
def marked(graph: nn.Module) -> Iterator[None]:
    """Inside, a traced graph keeps the name of every selection."""

    def mark(name: str, usual: Select, scores: Tensor, *rest: Any) -> Tensor:
        live = usual(scores, *rest)
        found: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Selected", (live,), {"name": name},
            dtype=live.dtype, shape=live.shape, version=1,
        )  # fmt: skip
        return found

    with _watched(graph, mark):
        yield


def named(model: Any) -> None:
    """Names in place of the markers of an ``onnx_ir.Model``.

    What the exporter found to be constant, as where all units are live, keeps its own.
    """
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != "Selected":
            continue
        (value,), (marker,) = node.inputs, node.outputs
        name = node.attributes["name"].as_string()
        if value.producer() is not None and not _NAMED.search(value.name):
            value.name = name
            value.type, value.shape = marker.type, value.shape or marker.shape
        marker.replace_all_uses_with(value, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def with_outputs(path: Path) -> bytes:
    """The file with all its selections among its outputs; weights in a file of their own stay."""
    (ir,) = need("onnx_ir")
    model = ir.load(path)
    for node in model.graph:
        model.graph.outputs.extend(v for v in node.outputs if _NAMED.search(v.name or ""))
    found: bytes = ir.to_proto(model).SerializeToString()
    return found


@dataclasses.dataclass
class Record:
    """One run.

    Attributes:
        masks: name -> bool, as selected; of the model's own where others are given.
        untied: selections that differ from the given ones by more than a tie.
    """

    masks: Masks
    untied: list[str]


@contextlib.contextmanager
def recorded(
    graph: nn.Module,
    given: Mapping[str, Tensor] | None = None,
    real: Callable[[Tensor], Tensor] = lambda mask: mask,
    tie: float = 0.0,
) -> Iterator[Record]:
    """Inside, one run of ``graph`` is recorded.

    Args:
        given: selections to use in place of its own.
        real: of a selection, what counts (not padding).
        tie: scores that differ by this share of the largest are as good as the same.
    """
    record = Record({}, [])

    def note(name: str, usual: Select, scores: Tensor, *rest: Any) -> Tensor:
        own = record.masks[name] = usual(scores, *rest)
        wanted = None if given is None else given.get(name)
        if wanted is None or wanted.shape != own.shape:
            return own
        differ = wanted != own
        if real(differ).any():
            # if it is a tie, this little makes the model select what is given
            largest = scores[scores.isfinite()].abs().max()
            step = torch.where(wanted, 1.0, -1.0) * tie * largest
            moved = usual(scores + step.to(scores) * differ, *rest)
            if real((moved != wanted) & differ).any():
                record.untied.append(name)
        return wanted

    with _watched(graph, note):
        yield record


@contextlib.contextmanager
def _watched(graph: nn.Module, act: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, ``act(name, select, scores, ...)`` selects in place of ``select(scores, ...)``."""
    calls: dict[str, int] = {}
    changed: list[tuple[nn.Module, str]] = []

    def acting(path: str, usual: Select) -> Select:
        def select(scores: Tensor, *rest: Any) -> Tensor:
            count = calls[path] = calls.get(path, -1) + 1
            name = f"{path}.live.{count}" if count else f"{path}.live"
            return act(name, usual, scores, *rest)

        return select

    try:
        for path, module in graph.named_modules():
            how = BLOCKS if hasattr(module, BLOCKS) else "live"
            if how == BLOCKS or isinstance(module, Budgeted):
                vars(module)[how] = acting(path, getattr(module, how))
                changed.append((module, how))
        yield
    finally:
        for module, how in changed:
            del vars(module)[how]
