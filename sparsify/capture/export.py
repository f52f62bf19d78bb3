"""torch.export with falling back: dynamic batch and sequence, then batch, then fixed sizes.

Everything is exported through one wrapper, whose forward takes a flat list of tensors and returns a
flat tuple; how the caller's arguments and the model's results map to those lists is data
(``sparsify.runtime.trees``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.capture.failures import failed
from sparsify.capture.normalise import normalise
from sparsify.errors import CaptureFailed
from sparsify.runtime.calling import Slot

PREFIX = "model"  # the wrapper's attribute that holds the model; stripped from every name
Flat = Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]]


class FlatCall(nn.Module):
    """``run(model, flat tensors) -> flat tensors`` as a module, for torch.export."""

    def __init__(self, model: nn.Module, run: Flat) -> None:
        super().__init__()
        self.model = model
        self._run = run

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(self.model, flat))


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported, normalised graph and what its inputs cover."""

    graph: fx.GraphModule
    slots: tuple[Slot, ...]
    notes: tuple[str, ...]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without torch's fused inference paths; every training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    loud = ("torch.export", "torch.fx.experimental.symbolic_shapes")
    noisy = [logging.getLogger(name) for name in loud]
    levels = [logger.level for logger in noisy]
    model.eval()
    # The fused encoder op would hide a whole layer from the matcher.
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in noisy:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


def export(
    model: nn.Module,
    run: Flat,
    example: Sequence[Tensor],
    names: Sequence[str],
    axes: Sequence[Sequence[int]],
) -> Exported:
    """Export ``run`` on ``example``.

    Args:
        axes: per flat input, the dimensions that should take any size (batch first).
    """
    attempts: list[tuple[str, list[list[int]]]] = [("", [list(a) for a in axes])]
    if any(len(a) > 1 for a in axes):
        attempts.append(("the sequence length is fixed", [list(a)[:1] for a in axes]))
    if any(axes):
        attempts.append(("all sizes are fixed", [[] for _ in axes]))
    wrapper = FlatCall(model, run)
    notes: list[str] = []
    first: Exception | None = None
    for loss, wanted in attempts:
        dims = tuple(dict.fromkeys(a, torch.export.Dim.AUTO) for a in wanted)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph of a failure
                program = torch.export.export(
                    wrapper, tuple(example), dynamic_shapes=(dims,), strict=False
                )
        except Exception as error:  # torch.export raises anything
            first = first or error
            continue
        if loss:
            assert first is not None
            notes.append(f"{loss}: {type(first).__name__}: {str(first).strip().splitlines()[0]}")
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        slots = slots_of(program, names)
        graph = normalise(module, names, PREFIX, model)
        return Exported(graph, slots, (*notes, *_fixed(slots, wanted)))
    assert first is not None
    raise failed(f"torch.export cannot capture {type(model).__name__}", first) from first


def slots_of(program: torch.export.ExportedProgram, names: Sequence[str]) -> tuple[Slot, ...]:
    """What the program's user inputs cover."""
    user = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    return tuple(
        _slot(program, name, node.meta["val"]) for name, node in zip(names, nodes, strict=True)
    )


def _slot(program: torch.export.ExportedProgram, name: str, value: Tensor) -> Slot:
    shape: list[int | None] = []
    limits: list[int | None] = []
    for size in value.shape:
        low, high = _range(program, size)
        shape.append(low if low == high else None)
        limits.append(None if low == high else high)
    return Slot(name, tuple(shape), tuple(limits), value.is_floating_point())


def _range(program: torch.export.ExportedProgram, size: Any) -> tuple[int | None, int | None]:
    """Smallest and largest size the trace holds for; the same number where the size is fixed."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)
    if known is not None:
        return known, known
    found = program.range_constraints.get(size.node.expr)
    if found is None:
        return None, None
    ends = []
    for end in (found.lower, found.upper):
        try:
            value = float(end)
        except (TypeError, ValueError, OverflowError):  # symbolic infinity
            value = math.inf
        # int_oo and the like come out as sizes near 2**63.
        ends.append(int(value) if abs(value) < 2**48 else None)
    return ends[0], ends[1]


def _fixed(slots: Sequence[Slot], wanted: Sequence[Sequence[int]]) -> Iterator[str]:
    """A note for every batch or token dimension of which the model needs one size."""
    for slot, dims in zip(slots, wanted, strict=True):
        for axis in dims if not slot.floating or len(slot.shape) == 3 else dims[:1]:
            size = slot.shape[axis]
            if size is None:
                continue
            tokens = axis == 1 and not slot.floating
            word = "batch" if axis == 0 else "sequence length" if tokens else f"dimension {axis}"
            yield f"'{slot.name}': the {word} is fixed at {size}"


def run_flat(graph: fx.GraphModule, example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The graph's outputs on ``example``, without gradients."""
    with torch.no_grad():
        return tuple(graph(*example))


def compare(model: nn.Module, ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    """CaptureFailed unless the graph's outputs equal the model's up to rounding."""
    for index, (mine, dense) in enumerate(zip(ours, theirs, strict=True)):
        gap = _gap(mine, dense)
        if gap is not None:
            raise CaptureFailed(
                f"the captured graph of {type(model).__name__} differs from the model",
                why=f"output {index} on {what}: {gap}",
                help="the forward depends on something that a graph cannot see "
                "(randomness, global state, a Python branch on values)",
            )


def _gap(mine: Tensor, dense: Tensor) -> str | None:
    if mine.shape != dense.shape:
        return f"shape {tuple(mine.shape)} instead of {tuple(dense.shape)}"
    if mine.dtype != dense.dtype:
        return f"dtype {mine.dtype} instead of {dense.dtype}"
    if mine.numel() == 0 or torch.equal(mine, dense):
        return None
    if not mine.is_floating_point():
        return "integers differ"
    a, b = mine.detach().double(), dense.detach().double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "not the same elements are finite"
    finite = a.isfinite() & b.isfinite()
    error = float((a - b)[finite].abs().max()) if finite.any() else 0.0
    scale = float(b[finite].abs().max()) if finite.any() else 0.0
    # The graph runs the model's own operations in the model's own order: a few roundings at most.
    bound = 64 * torch.finfo(mine.dtype).eps * max(scale, 1e-30)
    return None if error <= bound else f"largest difference {error:.3g} (scale {scale:.3g})"
