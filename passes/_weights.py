"""Weight maps: where each dense weight went, by state-dict name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify.core import Moved
from sparsify.regions import Attention, FeedForward, LinearWeight

if TYPE_CHECKING:
    from torch import Tensor


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
