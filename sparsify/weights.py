"""Weight maps: where each dense weight goes in a routed module, and how to take it out again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsify.core import Moved
from sparsify.errors import BadInput
from sparsify.regions import Attention, FeedForward, LinearWeight, Projection
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


# ---------------------------------------------------------------------------- for passes


def packed_ffn(ffn: FeedForward, name: str) -> tuple[Moved, ...]:
    """The weight map of a feed-forward layer packed into a module ``name`` under its path."""
    base = _under(ffn.path, name)
    moved: list[Moved] = []
    for role, linear in (("up", ffn.up), ("gate", ffn.gate), ("down", ffn.down)):
        if linear is None:
            continue
        how = "columns, transposed" if role == "down" else "rows"
        part = " of the fused projection" if linear.rows is not None else ""
        order = f"{how}{part} in the order {base}.order"
        bias = "unchanged" if role == "down" else order
        moved += _pair(
            linear, (f"{base}.{role}", order, role), (f"{base}.{role}_bias", bias, f"{role}_bias")
        )
    return tuple(moved)


def packed_attention(attention: Attention) -> tuple[Moved, ...]:
    """The weight map of an attention's query and output projections, packed head by head."""
    out, query = (_under(attention.path, name) for name in ("output", "query"))
    moved = _pair(
        attention.output,
        (f"{out}.blocks", "columns by head, transposed", "weight"),
        (f"{out}.bias", "unchanged", "bias"),
    )
    if attention.query_rows is not None:
        how = "rows by head"
        if attention.query.rows is not None:
            how += ", the fused key and value rows beside them"
        moved += _pair(
            attention.projection, (f"{query}.blocks", how, "weight"), (f"{query}.bias", how, "bias")
        )
    return tuple(moved)


def packed_hidden(ffn: FeedForward) -> tuple[Moved, ...]:
    """The weight map of a feed-forward layer packed by sub-dimension into ``mohd``."""
    moved: list[Moved] = []
    for role, linear in (("up", ffn.up), ("gate", ffn.gate), ("down", ffn.down)):
        if linear is None:
            continue
        base = f"{_under(ffn.path, 'mohd')}.{role}"
        how = "rows by sub-dimension" if role == "down" else "columns by sub-dimension, transposed"
        bias = "by sub-dimension" if role == "down" else "unchanged"
        moved += _pair(linear, (f"{base}.blocks", how, "weight"), (f"{base}.bias", bias, "bias"))
    return tuple(moved)


def packed_latents(ffn: FeedForward, name: str) -> tuple[Moved, ...]:
    """The weight map of a feed-forward layer whose experts ``name`` keeps as latent ones."""
    base = _under(ffn.path, name)
    moved: list[Moved] = []
    for role, linear in (("up", ffn.up), ("gate", ffn.gate), ("down", ffn.down)):
        if linear is None:
            continue
        order = f"rows in the order {base}.experts.order"
        side = "write" if role == "down" else "read"
        how = f"{base}.experts.{role} @ {side}, {order}" + (", transposed" * (role == "down"))
        bias = (
            (f"{base}.experts.{role}_bias", order) if role != "down" else (f"{base}.bias", "as is")
        )
        moved += _pair(linear, (f"{base}.{side}", how, role), (*bias, f"{role}_bias"))
    return tuple(moved)


def packed_projection(
    projection: Projection, name: str, tensor: str, how: str
) -> tuple[Moved, ...]:
    """The weight map of one projection that became ``tensor`` of a module ``name``."""
    base = _under(projection.path, name)
    return tuple(
        _pair(
            projection.linear,
            (f"{base}.{tensor}", how, "weight"),
            (f"{base}.bias", "unchanged", "bias"),
        )
    )


def _under(path: str, name: str) -> str:
    return f"{path.split('#')[0]}.{name}".lstrip(".")


def _pair(
    linear: LinearWeight, weight: tuple[str, str, str], bias: tuple[str, str, str]
) -> list[Moved]:
    rows = runs(linear.rows)
    sparse, how, role = weight
    moved = [Moved(linear.weight_name, sparse, how, role, linear.transposed, rows)]
    if linear.bias_name is not None:
        sparse, how, role = bias
        moved.append(Moved(linear.bias_name, sparse, how, role, False, rows))
    return moved


def runs(rows: Tensor | None) -> tuple[tuple[int, int], ...]:
    """Ascending or not, the rows as half-open runs: 4,5,6,9 -> (4, 7), (9, 10)."""
    if rows is None:
        return ()
    found: list[tuple[int, int]] = []
    for row in rows.tolist():
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)
