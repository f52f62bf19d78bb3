"""From a sparse model's graph to an exported program of plain ATen operators."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.codegen.onnx import selections
from sparsify.codegen.onnx.forms import Unformed, into_forms
from sparsify.codegen.plan import working
from sparsify.errors import NotExported
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.graph import clone
from sparsify.runtime.model import SparseModel

HOW = {
    "mask": "by masks", "branch": "in branches", "moe": "as com.microsoft MoE",
    "custom": "as an operator of our own", "dense": "dense",
}  # fmt: skip
_NOISY = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx", "onnxscript")


def traced(graph: fx.GraphModule, model: SparseModel) -> torch.export.ExportedProgram:
    """The program of :func:`formed`'s graph, every size that ``model`` covers left open, its
    selections marked.

    Raises:
        NotExported: torch.export cannot trace the forms.
    """
    try:
        with selections.marked(graph):
            return _export(graph, model)
    except Exception as error:  # torch.export raises anything
        raise NotExported(
            f"{model.call_spec.model} cannot be traced for export",
            why=f"{type(error).__name__}: {first_line(error)}",
            where=_where(error),
            help="leave out the pass that routes this region (skip=PATH), and export again",
        ) from error


def formed(
    model: SparseModel, way: str = "mask", ways: Mapping[str, str] | None = None
) -> fx.GraphModule:
    """A clone of the model's graph, its weights shared, its routed modules in their forms.

    Args:
        way, ways: of :func:`sparsify.codegen.onnx.forms.into_forms`.

    Raises:
        NotExported: a module has no form.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    graph = clone(model.graph, shared)
    graph.eval()
    try:
        into_forms(graph, way, ways)
    except Unformed as error:
        raise NotExported(
            f"the {error.kind} at {error.path} cannot be exported",
            why=error.refused.reason,
            help=error.refused.suggestion,
        ) from error
    with torch.no_grad():
        graph.forward(*model.example)  # forms look at the example once, with real numbers
    return graph


def told(graph: fx.GraphModule) -> dict[str, int]:
    """What routed modules became -> how many of them."""
    found: dict[str, int] = {}
    for _, module in working(graph):
        kind = next(c for c in type(module).__mro__ if ".onnx." not in c.__module__).__name__
        how = HOW[getattr(module, "way", "mask")]
        found[f"{kind} {how}"] = found.get(f"{kind} {how}", 0) + 1
    return found


def _export(graph: fx.GraphModule, model: SparseModel) -> torch.export.ExportedProgram:
    if isinstance(model.call_spec, CausalCall):
        _tell_sizes(graph.graph, model.call_spec)
        graph.recompile()
    example = tuple(model.example)
    with torch.no_grad(), silenced():
        return torch.export.export(graph, example, dynamic_shapes=dims_of(model), strict=False)


def dims_of(model: SparseModel) -> tuple[dict[int, Any], ...]:
    """Per input, the dimensions of any size."""
    free = torch.export.Dim.AUTO
    return tuple(
        {axis: free for axis, size in enumerate(slot.shape) if size is None}
        for slot in model.call_spec.slots
    )


def _tell_sizes(graph: fx.Graph, call: CausalCall) -> None:
    """Let the graph say which sizes of a language model's inputs are one.

    Otherwise every cached tensor has a length of its own, in the file's names too.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if any(size is not None for size in call.slots[0].shape):
        return
    with graph.inserting_after(inputs[-1]):
        graph.call_function(_same_sizes, (inputs, 2 * len(call.layers), call.masked))


def _same_sizes(flat: list[Tensor], cached: int, masked: bool) -> None:
    (batch, tokens), cache = flat[0].shape, flat[len(flat) - cached :]
    past = cache[0].shape[2] if cached else 0
    for number, tensor in enumerate(flat[1 : len(flat) - cached]):
        torch._check(tensor.shape[0] == batch)
        torch._check(tensor.shape[1] == (tokens + past if masked and number == 0 else tokens))
    for tensor in cache:
        torch._check(tensor.shape[0] == batch)
        torch._check(tensor.shape[2] == past)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without the exporters' chatter on stderr; what matters is in their errors."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Of the message."""
    return (str(error).strip().splitlines() or [""])[0]


def _where(error: BaseException) -> str | None:
    """The form in whose code tracing stopped."""
    place, at = None, error.__traceback__
    while at is not None:
        owner = at.tb_frame.f_locals.get("self")
        if "/codegen/onnx/form" in at.tb_frame.f_code.co_filename and owner is not None:
            place = f"in a {type(owner).__name__}"
        at = at.tb_next
    return place
