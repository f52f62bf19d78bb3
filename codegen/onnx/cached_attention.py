"""Attention that holds its own cache: one operator instead of six around it.

A traced graph splits heads (``Reshape``, ``Transpose``), appends keys and values to what is cached
(``Concat``), attends, and joins heads. The standard's ``Attention`` (opset 23) takes queries, keys
and values as the projections give them, (B, S, heads * d), and the cache beside them, and gives the
longer cache; ``RotaryEmbedding`` takes the same layout. Values are the same to the last bit in ONNX
Runtime 1.32.

Measured there on four layers of SmolLM2's attention (9 query heads, d 64) with next to no
feed-forward layers: microseconds that a layer saves, one token after 256 cached, after 1024. 3
key/value heads: one thread 13, 54; two threads less than the same file differs from itself (28).
9 key/value heads: one thread 15, 170; two 80, 153; with q, k, v as one product
(:mod:`sparsify.codegen.onnx.one_product`) 38, 167 and 112, 195. Prefill of 128: 1 to 2 % faster, 6
on two threads with 9; the one product takes half of that back. A dense model of SmolLM2's sizes,
30 layers, one token after 256, both together: two threads 6 % faster (5 processes), one thread no
difference that shows (0.99 to 1.02 of two copies of the file without them, which differ by 4 %).

Tried in the same places, com.microsoft operators. ``GroupQueryAttention`` (rotation outside,
padding as ``attention_bias``, ``query_seqlens`` so that a batch may decode several tokens at once):
with 3 heads -8, -30 and 29, -2; with 9 26, 149 and -15, -133. With one product for q, k, v and 3
heads it is 1 to 3 % faster than this with one product on two threads, 8 and 12 % slower on one. Its
own rotation (``do_rotary``) uses, as its documentation says, one position of a first prompt, where
left padding needs one per row. ``MultiHeadAttention`` needs as many key/value heads as
query heads: 23, 122 and 11, 92 there. ``SkipSimplifiedLayerNormalization`` for a sum and its
``RMSNormalization``: nothing for one token, 2 % slower at 128 on one thread. Gate and up as one
product: nothing.

All are medians over 5 to 9 processes that load the files in random order: in one process the same
file, loaded first and last, differed by 10 %.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.values import take_over

SPLIT = (0, 2, 1, 3)  # (B, S, H, d) <-> (B, H, S, d)


@dataclasses.dataclass(frozen=True)
class Heads:
    """What gives queries, keys or values.

    Attributes:
        joined: (B, S, count * width), before heads are apart; count: of heads.
        rotary: the ``RotaryEmbedding`` on the way, if there is one.
    """

    joined: Any
    count: int
    rotary: Any | None


def with_cache(model: Any) -> int:
    """Give every ``Attention`` of an ``onnx_ir.Model`` that has a cache its cache; how many."""
    (common,) = need("onnx_ir.passes.common")
    found = 0
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            found += _rewritten(model.graph, node)
    if found:
        model.graph.sort()
        common.RemoveUnusedNodesPass()(model)  # what was around them
    return found


def _rewritten(graph: Any, node: Any) -> bool:
    (ir,) = need("onnx_ir")
    given = [*node.inputs, None, None, None, None][:7]
    if any(value is not None for value in given[4:]) or _number(node, "is_causal"):
        return False
    if len([value for value in node.outputs if value.uses() or value.is_graph_output()]) != 1:
        return False
    caches = [cache for value in given[1:3] if (cache := _appended(value)) is not None]
    out = _joined(node.outputs[0])
    if len(caches) < 2 or out is None:
        return False
    sources = (given[0], *(new for _, new, _ in caches))
    heads = [part for value in sources if (part := _apart(value)) is not None]
    if len(heads) < 3 or heads[1].count != heads[2].count:
        return False
    query, key, value = (_turned(node, part) for part in heads)
    attributes = {name: a for name, a in node.attributes.items() if name != "is_causal"}
    made = ir.node(
        "Attention", [query, key, value, given[3], caches[0][0], caches[1][0]],
        {**attributes, "q_num_heads": heads[0].count, "kv_num_heads": heads[1].count},
        num_outputs=3, name=f"{node.name}.cached",
    )  # fmt: skip
    graph.insert_before(node, made)
    for old, new in zip((out, *(whole for *_, whole in caches)), made.outputs, strict=True):
        take_over(old, new)
    return True


def _appended(value: Any) -> tuple[Any, Any, Any] | None:
    """(cached, new, both) of keys or values (B, H, S, d)."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    return (*node.inputs, value) if node.attributes["axis"].as_int() in (2, -2) else None


def _apart(value: Any) -> Heads | None:
    """Where (B, H, S, d) comes from (B, S, H * d)."""
    node, rotary = value.producer(), None
    if node is not None and node.op_type == "RotaryEmbedding" and _only_use(value):
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return None  # with positions its tables mean something else
        rotary, node = node, node.inputs[0].producer()
    if not _is_split(node) or not _only_use(node.outputs[0]):
        return None
    reshape = node.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape":
        return None
    joined, apart = _sizes(reshape.inputs[0]), _sizes(reshape.outputs[0])
    if len(joined) != 3 or len(apart) != 4 or joined[:2] != apart[:2]:
        return None
    if not all(size.isdigit() for size in (joined[2], *apart[2:])):
        return None
    count = int(apart[2])
    return (
        Heads(reshape.inputs[0], count, rotary) if count * int(apart[3]) == int(joined[2]) else None
    )


def _joined(value: Any) -> Any | None:
    """(B, S, H * d) that (B, H, S, d) becomes, if nothing else reads it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or not _is_split(uses[0].node):
        return None
    apart = uses[0].node.outputs[0]
    uses = list(apart.uses())
    if len(uses) != 1 or apart.is_graph_output() or uses[0].node.op_type != "Reshape":
        return None
    joined = uses[0].node.outputs[0]
    before, after = _sizes(apart), _sizes(joined)
    if len(before) != 4 or len(after) != 3 or before[:2] != after[:2]:
        return None
    return joined if all(size.isdigit() for size in before[2:]) else None


def _turned(place: Any, heads: Heads) -> Any:
    """(B, S, H * d), positions in it."""
    (ir,) = need("onnx_ir")
    if heads.rotary is None:
        return heads.joined
    old = heads.rotary
    made = ir.node(
        "RotaryEmbedding", [heads.joined, *old.inputs[1:3]],
        {**dict(old.attributes), "num_heads": heads.count}, name=f"{old.name}.joined",
    )  # fmt: skip
    place.graph.insert_before(place, made)
    value, joined = made.outputs[0], heads.joined
    value.name, value.type, value.shape = f"{old.outputs[0].name}.joined", joined.type, joined.shape
    return value


def _is_split(node: Any) -> bool:
    return bool(
        node is not None and node.op_type == "Transpose"
        and tuple(node.attributes["perm"].as_ints()) == SPLIT
    )  # fmt: skip


def _only_use(value: Any) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _sizes(value: Any) -> list[str]:
    """As texts; none where one is not known."""
    sizes = [] if value.shape is None else [str(size) for size in value.shape]
    return [] if "None" in sizes else sizes


def _number(node: Any, name: str) -> int:
    given = node.attributes.get(name)
    return 0 if given is None else int(given.as_int())
