"""Weight maps: where each dense weight went, by state-dict name."""

from __future__ import annotations

from sparsify.core import Moved
from sparsify.regions import Attention, FeedForward


def packed_ffn(ffn: FeedForward, name: str) -> tuple[Moved, ...]:
    """The weight map of a feed-forward layer packed into a module ``name`` under its path."""
    base = f"{ffn.path.split('#')[0]}.{name}".lstrip(".")
    roles = {"up": ffn.up, "gate": ffn.gate, "down": ffn.down}
    moved = []
    for role, linear in roles.items():
        if linear is None:
            continue
        how = "columns, transposed" if role == "down" else "rows"
        part = " of the fused projection" if linear.rows is not None else ""
        moved.append(
            Moved(linear.weight_name, f"{base}.{role}", f"{how}{part} in the order {base}.order")
        )
        if linear.bias_name is not None:
            kept = "unchanged" if role == "down" else f"in the order {base}.order"
            moved.append(Moved(linear.bias_name, f"{base}.{role}_bias", kept))
    return tuple(moved)


def packed_attention(attention: Attention) -> tuple[Moved, ...]:
    """The weight map of an attention's query and output projections, packed head by head."""
    base = attention.path.split("#")[0]
    prefix = f"{base}." if base else ""
    out = attention.output
    moved = [Moved(out.weight_name, f"{prefix}output.blocks", "columns by head, transposed")]
    if out.bias_name is not None:
        moved.append(Moved(out.bias_name, f"{prefix}output.bias", "unchanged"))
    if attention.query_rows is not None:
        query = attention.projection
        how = "rows by head"
        if attention.query.rows is not None:
            how += ", the fused key and value rows beside them"
        moved.append(Moved(query.weight_name, f"{prefix}query.blocks", how))
        if query.bias_name is not None:
            moved.append(Moved(query.bias_name, f"{prefix}query.bias", how))
    return tuple(moved)
