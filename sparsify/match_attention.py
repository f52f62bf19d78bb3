"""Attention by roles: softmax(score(q k^T)) v, up to its projections and down to the output's.

The anchor is one ``scaled_dot_product_attention`` or a matmul whose left operand comes from a
softmax over a matmul. Everything between the raw products and the probabilities (scale, soft-cap,
masks, biases, casts) becomes the region's score program, so a routed form can run it on the live
rows only. Heads are told apart by pushing labels and gradients through whatever lies between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import fx

from sparsify.linears import Linear, projections
from sparsify.match_ffn import Missed, common_path, plain, residual
from sparsify.probe import (
    NotFollowed,
    head_columns,
    head_rows,
    is_cast,
    is_identity,
    is_movement,
    is_pointwise,
    op_base,
    pairs_in_order,
    push,
    shape_of,
    source_line,
    time_major,
)
from sparsify.regions import Attention, NearMiss, Site
from sparsify.runtime.codec import op_name
from sparsify.runtime.program import Program, Ref, Step

SOFTMAX = frozenset("softmax _softmax _safe_softmax".split())
TRANSPOSES = frozenset("transpose permute mT swapaxes".split())


@dataclasses.dataclass
class _Core:
    """The part between q, k, v and the weighted sum, however spelled."""

    result: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    score: Program
    operands: list[fx.Node]
    causal: bool
    nodes: list[fx.Node]
    spelled: str


def match_attention(
    gm: fx.GraphModule, node: fx.Node, linears: dict[fx.Node, Linear]
) -> Attention | NearMiss | None:
    """The region anchored at ``node``, a near miss, or None where ``node`` is no anchor."""
    try:
        core = _core(node, linears)
        if core is None:
            return None
        return _region(gm, core, linears)
    except (Missed, NotFollowed) as error:
        role = error.role if isinstance(error, Missed) else "heads"
        return NearMiss("Attention", _module_path(node), role, str(error), source_line(node.meta))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else node.name


def _core(node: fx.Node, linears: dict[fx.Node, Linear]) -> _Core | None:
    base = op_base(node)
    if base == "scaled_dot_product_attention":
        return _sdpa(node)
    if base in ("matmul", "bmm") and node not in linears:
        return _eager(node)
    return None


def _sdpa(node: fx.Node) -> _Core:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    if len(shape_of(q)) != 4:
        raise Missed(
            "query", f"q has {len(shape_of(q))} dimensions, (batch, head, token, feature) expected"
        )
    scale = given.get("scale") or 1.0 / math.sqrt(shape_of(q)[-1])
    steps = [Step("scaled", "aten.mul.Tensor", (Ref("scores"), float(scale)), {})]
    operands: list[fx.Node] = []
    mask = given.get("attn_mask")
    last = "scaled"
    if isinstance(mask, fx.Node):
        operands.append(mask)
        if mask.meta["dtype"] == torch.bool:
            steps.append(Step("dead", "aten.logical_not.default", (Ref("op0"),), {}))
            steps.append(
                Step("masked", "aten.masked_fill.Scalar", (Ref(last), Ref("dead"), -math.inf), {})
            )
        else:
            steps.append(Step("masked", "aten.add.Tensor", (Ref(last), Ref("op0")), {}))
        last = "masked"
    steps.append(Step("live", "aten._safe_softmax.default", (Ref(last), -1), {}))
    inputs = ("scores", *(f"op{i}" for i in range(len(operands))))
    program = Program(inputs, tuple(steps), "live")
    return _Core(
        node, q, k, v, program, operands, bool(given.get("is_causal", False)), [node], "sdpa"
    )


def _eager(node: fx.Node) -> _Core | None:
    left, v = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(v, fx.Node):
        return None
    after: list[fx.Node] = []  # between softmax and the weighted sum
    walk = left
    while op_base(walk) not in SOFTMAX:
        if not (is_pointwise(walk) or is_movement(walk)) or not isinstance(walk.args[0], fx.Node):
            return None
        after.append(walk)
        walk = walk.args[0]
    softmax = walk
    path = _score_path(softmax.args[0])
    if path is None:
        return None
    product = path[0]
    if len(shape_of(product)) != 4:
        raise Missed(
            "scores",
            f"scores have {len(shape_of(product))} dimensions, (batch, head, query, key) expected",
        )
    on_path = [*path, softmax, *reversed(after)]
    for step in on_path:
        if not (is_pointwise(step) or step is product or step is softmax):
            raise Missed("scores", f"{op_base(step)} between the scores and the weighted sum")
        if len(step.users) != 1:
            raise Missed("scores", f"the attention scores are also used elsewhere ({step.name})")
    k_t = product.args[1]
    flips = isinstance(k_t, fx.Node) and op_base(k_t) in TRANSPOSES
    k = k_t.args[0] if flips and isinstance(k_t, fx.Node) else None
    if not isinstance(k, fx.Node) or not _swaps_last(k_t, k):  # type: ignore[arg-type]
        raise Missed("key", "the right operand of the score product is not a transposed key")
    dim = softmax.args[1]
    if dim not in (-1, 3):
        raise Missed("scores", f"softmax runs over dimension {dim}, not over keys")
    operands: list[fx.Node] = []
    program = _score_program(on_path, product, softmax, operands)
    q = product.args[0]
    return _Core(node, q, k, v, program, operands, False, [*on_path, node], "eager")  # type: ignore[arg-type]


def _swaps_last(node: fx.Node, before: fx.Node) -> bool:
    shape, was = shape_of(node), shape_of(before)
    if op_base(node) == "mT":
        return True
    if op_base(node) == "permute":
        return [int(d) % 4 for d in node.args[1]] == [0, 1, 3, 2]  # type: ignore[union-attr,arg-type]
    dims = {int(d) % 4 for d in node.args[1:3]}  # type: ignore[arg-type]
    return dims == {2, 3} and shape[:2] == was[:2]


def _score_path(node: Any) -> list[fx.Node] | None:
    """From the raw product q k^T (first) up to ``node`` (last), through elementwise nodes."""
    if not isinstance(node, fx.Node):
        return None
    if op_base(node) in ("matmul", "bmm"):
        return [node]
    if not (is_pointwise(node) or is_movement(node)):
        return None
    for arg in node.all_input_nodes:
        if shape_of(arg)[-2:] == shape_of(node)[-2:] or len(shape_of(arg)) == len(shape_of(node)):
            path = _score_path(arg)
            if path is not None:
                return [*path, node]
    return None


def _score_program(
    on_path: list[fx.Node], product: fx.Node, softmax: fx.Node, operands: list[fx.Node]
) -> Program:
    names: dict[fx.Node, Any] = {product: Ref("scores")}
    steps: list[Step] = []

    def load(arg: fx.Node) -> Any:
        if arg in names:
            return names[arg]
        if "int" in arg.meta:
            raise Missed("scores", f"the scores depend on a size ({arg.name})")
        if arg not in operands:
            operands.append(arg)
        return Ref(f"op{operands.index(arg)}")

    for node in on_path[1:]:
        source = node.args[0]
        same = isinstance(source, fx.Node) and source.meta.get("dtype") == node.meta.get("dtype")
        if (is_identity(node) or (is_cast(node) and same)) and source in names:
            names[node] = names[source]  # type: ignore[index]
            continue
        args = list(plain(fx.map_arg(node.args, load)))
        if node is softmax:
            args[1] = -1
        steps.append(
            Step(node.name, op_name(node.target), tuple(args), dict(fx.map_arg(node.kwargs, load)))
        )
        names[node] = Ref(node.name)
    inputs = ("scores", *(f"op{i}" for i in range(len(operands))))
    return Program(inputs, tuple(steps), names[on_path[-1]].name)


def _kv_heads(node: fx.Node, heads: int) -> fx.Node:
    """The key or value before its heads were repeated for grouped queries."""
    best = node
    walk = node
    while is_movement(walk) and isinstance(walk.args[0], fx.Node):
        walk = walk.args[0]
        shape, full = shape_of(walk), shape_of(node)
        if (
            len(shape) == 4
            and (shape[0], *shape[2:]) == (full[0], *full[2:])
            and heads % shape[1] == 0
        ):
            labels = torch.arange(math.prod(shape)).view(shape)
            try:
                repeated = push(walk, labels, node)
            except NotFollowed:
                break
            if torch.equal(repeated, labels.repeat_interleave(heads // shape[1], dim=1)):
                best = walk
    return best


def _sources(node: fx.Node, linears: dict[fx.Node, Linear]) -> list[Linear]:
    """The projections nearest above ``node``."""
    found: dict[Linear, None] = {}
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        walk = stack.pop()
        if walk in seen:
            continue
        seen.add(walk)
        if walk in linears:
            found[linears[walk]] = None
        else:
            stack.extend(walk.all_input_nodes)
    return list(found)


def _output(core: _Core, linears: dict[fx.Node, Linear]) -> Linear:
    """The projection that consumes the heads' result."""
    by_input = {linear.x: linear for linear in linears.values()}
    walk = core.result
    while walk not in by_input:
        if len(walk.users) != 1:
            raise Missed("output", f"the heads' result is used {len(walk.users)} times")
        (walk,) = walk.users
        if not (is_movement(walk) or is_identity(walk) or is_cast(walk)):
            raise Missed(
                "output",
                f"the heads' result goes through {op_base(walk)} before the output projection",
            )
    if len(walk.users) != 1 and not all(u in by_input[walk].nodes for u in walk.users):
        raise Missed("output", "the heads' result is also used beside the output projection")
    return by_input[walk]


def _region(gm: fx.GraphModule, core: _Core, linears: dict[fx.Node, Linear]) -> Attention:
    heads, head_dim = shape_of(core.q)[1], shape_of(core.q)[3]
    k, v = _kv_heads(core.k, heads), _kv_heads(core.v, heads)
    if shape_of(k)[1] != shape_of(v)[1]:
        k, v = core.k, core.v
    value_dim = shape_of(v)[3]
    output = _output(core, linears)
    columns = head_columns(core.result, output.x)
    above = _sources(core.q, linears)
    if len(above) != 1:
        raise Missed("query", f"{len(above)} projections feed the queries (1 expected)")
    query = above[0]
    key, value = (_sources(n, linears) for n in (k, v))
    sites = {
        "attend": Site(core.result, tuple(core.nodes)),
        "output": Site(output.result, output.nodes),
    }
    rows = None
    try:
        rows = head_rows(query.result, core.q)
        if _query_is_private(query, core, rows, {k, v}, key + value):
            sites["query"] = Site(query.result, query.nodes)
        else:
            rows = None
    except NotFollowed:
        rows = None  # heads are mixed after the projection: q stays dense, the rest can be routed
    tokens_first = time_major(query.result, core.q)
    if not pairs_in_order(core.result, output.x, tokens_first):
        raise Missed("output", "tokens of the heads' result stand in another order than queries")
    fused = query.result in {linear.result for linear in key + value}
    kept = rows.flatten() if rows is not None and fused else None
    ports = {
        "x": query.x,
        "q": core.q,
        "k": k,
        "v": v,
        "context": output.x,
        "y": output.result,
        "query": query.result,
    } | {f"score.{i}": n for i, n in enumerate(core.operands)}
    # attention without a residual connection is attention all the same
    with contextlib.suppress(Missed):
        ports["stream"] = residual(output.result, query.x)
    out = output.tensors(gm)
    roles = [("query", query), *(("key", k) for k in key), *(("value", v) for v in value)]
    parts = projections(gm, [*roles, ("output", output)], ports)
    for part in parts:
        part.time_major = tokens_first
    return Attention(
        path=common_path([str(query.weight.target), out.weight_name]),
        where=source_line(core.result.meta),
        heads=heads,
        kv_heads=shape_of(k)[1],
        head_dim=head_dim,
        value_dim=value_dim,
        query=query.tensors(gm, kept),
        projection=query.tensors(gm),
        query_rows=rows,
        key=key[0].tensors(gm) if len(key) == 1 else None,
        value=value[0].tensors(gm) if len(value) == 1 else None,
        output=out,
        output_columns=columns,
        score=core.score,
        score_operands=tuple(f"score.{i}" for i in range(len(core.operands))),
        causal=core.causal,
        time_major=tokens_first,
        cross=bool(key) and all(linear.x is not query.x for linear in key),
        spelled=core.spelled,
        ports=ports,
        sites=sites,
        parts=parts,
    )


def _query_is_private(
    query: Linear, core: _Core, rows: Any, kv: set[fx.Node], kv_sources: list[Linear]
) -> bool:
    """The query rows of the projection reach nothing but this attention's q."""
    stop = {core.q, *kv, core.k, core.v}
    ends: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [query.result]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in stop:
            ends.add(node)
            continue
        if not node.users or node.op == "output":
            return False
        stack.extend(node.users)
    shared = query in kv_sources
    if not shared:
        return ends == {core.q}
    taken = set(rows.flatten().tolist())
    for node in kv:
        try:
            other = head_rows(query.result, node)
        except NotFollowed:
            return False
        if taken & set(other.flatten().tolist()):
            return False
    return True
