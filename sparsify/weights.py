"""The inverse of the weight map: a dense model's tensors, taken out of the routed modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsify.core import Moved
from sparsify.errors import BadInput
from sparsify.runtime.spec import RoutedModule


def dense_weights(model: nn.Module, moved: Iterable[Moved]) -> dict[str, Tensor]:
    """Dense state-dict name -> tensor, for every weight that the passes moved.

    Before any training this is the dense model's state bit for bit; of upcycled experts the first
    one is taken.

    Args:
        model: the sparse model.
        moved: its weight map (``step.weights`` of its report's steps).
    """
    parts: dict[str, list[tuple[Moved, Tensor]]] = {}
    for move in moved:
        path = move.sparse.rpartition(".")[0]
        module = model.get_submodule(path)
        if not isinstance(module, RoutedModule):
            raise BadInput(f"{path} is no routed module", help="the weight map is another model's")
        parts.setdefault(move.dense, []).append((move, module.dense_weights()[move.role]))
    return {name: _join(pieces) for name, pieces in parts.items()}


def _join(pieces: list[tuple[Moved, Tensor]]) -> Tensor:
    """One dense tensor from the roles that share it."""
    move, tensor = pieces[0]
    if move.rows:
        rows = [torch.cat([torch.arange(a, b) for a, b in m.rows]) for m, _ in pieces]
        total = sum(len(r) for r in rows)
        whole = tensor.new_empty((total, *tensor.shape[1:]))
        for index, (_, part) in zip(rows, pieces, strict=True):
            whole[index] = part
        tensor = whole
    return tensor.t() if move.transposed else tensor
