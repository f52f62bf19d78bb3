"""Typed regions: what the matcher finds and what passes rewrite.

A region names its weights and facts; a pass never sees an ATen node. Ports are values that exist in
the graph ("x", "hidden", ...); sites are computations that a pass may replace ("ffn", "query",
"attend", "output"). The matcher keeps the nodes behind both; ``sparsify.rewrite`` uses them.
Shapes: D = model width, F = FFN width, H = query heads, G = key/value heads, d = head width.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from sparsify.runtime.program import Program
    from sparsify.runtime.spec import RoutedModule


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """One dense projection ``y = x @ weight.T + bias``, whatever its spelling in the model.

    Attributes:
        weight: (out, in) view of the parameter (transposed here where the model stores (in, out)).
        bias: (out,) or None.
        weight_name, bias_name: state-dict names.
        transposed: True where the model stores the weight as (in, out), as GPT-2's Conv1D does.
        rows: the rows of the stored projection that play this role (int64, (out,)), where several
            roles share one fused projection; None where the projection is this role alone.
            ``weight`` and ``bias`` are already restricted to them.
    """

    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str | None = None
    transposed: bool = False
    rows: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """State-dict names this role reads."""
        return (self.weight_name,) + ((self.bias_name,) if self.bias_name else ())


@dataclasses.dataclass
class Region:
    """A part of the model with a role.

    Attributes:
        path: where it lives, e.g. ``model.layers.0.mlp`` (unique among regions of one kind).
        where: ``file.py:line   source text`` of the user's code.
        index: position among regions of its kind, in execution order; count: how many there are.
        sites: site name -> (its nodes' inputs, its result) as graph nodes; for ``rewrite`` only.
        ports: port name -> node. Where a value per sample modulates ``x`` (the noise embedding of a
            diffusion transformer), ``condition`` (B, C) is that value. ``input.NAME`` (B, T) are
            the graph's integer inputs with one value per row of ``x``; ``tokens`` is the one that
            token embeddings are looked up with.
        samples: port name -> (tokens, width) calibration rows (``port.energy``: (tokens, 1) squared
            norms of the port's rows; ``x.slope``: (1, in), see :mod:`sparsify.sensitivity`), filled
            when the pass asked and calibration data were given. Rows of all ports of a region
            belong to the same tokens.
        rewritten_by: the pass that already rewrote it, if any.
        blocked: why no pass can rewrite it any more, where a region that overlaps was rewritten.
        block: index of the repeated block it lies in, or None.
        parts: smaller regions inside it (its projections); Matches.all_regions lists them too.
        made: splice name -> module, of the pass that rewrote it.
        host: where a larger region was rewritten (``blocked`` says so) by a module inside which
            parts still can be routed.
    """

    kind: ClassVar[str] = "Region"
    path: str
    where: str
    index: int = 0
    count: int = 1
    ports: dict[str, fx.Node] = dataclasses.field(default_factory=dict, repr=False)
    sites: dict[str, Site] = dataclasses.field(default_factory=dict, repr=False)
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    rewritten_by: str | None = None
    blocked: str | None = None
    block: int | None = None
    parts: list[Projection] = dataclasses.field(default_factory=list, repr=False)
    made: dict[str, nn.Module] = dataclasses.field(default_factory=dict, repr=False)
    host: Host | None = dataclasses.field(default=None, repr=False)

    @property
    def whole(self) -> Region:
        """The region whose result shows what this one does: itself, or the one it lies inside."""
        return self if self.host is None else self.host.region

    @property
    def condition_width(self) -> int:
        """C: features of the port ``condition``; 0 where there is none."""
        node = self.ports.get("condition")
        return int(node.meta["shape"][-1]) if node is not None else 0

    def facts(self) -> dict[str, Any]:
        """What a reader wants to know, as plain values."""
        return {}

    @property
    def length(self) -> int:
        """Roundings on the longest path through the region (for tolerances)."""
        return 1


@dataclasses.dataclass(frozen=True)
class Host:
    """A routed module with linears inside that can be routed too, and the region it computes."""

    region: Region
    module: RoutedModule


@dataclasses.dataclass
class Site:
    """A replaceable computation: ``nodes`` compute ``result``; all but the result are private.

    ``extra``: further results that are read outside; a module at this site returns a tuple then.
    """

    result: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    extra: tuple[fx.Node, ...] = ()


@dataclasses.dataclass
class Projection(Region):
    """One dense projection ``y = x W^T + b`` of a larger region.

    Ports: ``x`` (..., in), ``y`` (..., out), ``result`` the result of the larger region and
    ``stream`` its residual stream (where it has one); of ``up``, ``gate`` (..., out) what its
    result is multiplied with, where that is known before it. Sites: ``projection``.
    ``role``: what it is in the larger region, ``up``, ``gate``, ``down``, ``query``, ``key``,
    ``value``, ``output``, or several joined by ``+`` where they are fused. ``parent``: its path.
    ``time_major``: rows run over (T, B) inside the region, not (B, T). ``beside``: all projections
    of the larger region that read the same ``x``, this one included. ``peers``: the projections
    with its role in all blocks of the run, in order, this one included; empty outside such a run.
    ``within``: the larger region.
    """

    kind: ClassVar[str] = "Projection"
    linear: LinearWeight = dataclasses.field(kw_only=True)
    role: str = dataclasses.field(kw_only=True)
    parent: str = dataclasses.field(kw_only=True, default="")
    time_major: bool = dataclasses.field(kw_only=True, default=False)
    beside: tuple[LinearWeight, ...] = dataclasses.field(kw_only=True, default=(), repr=False)
    peers: tuple[Projection, ...] = dataclasses.field(kw_only=True, default=(), repr=False)
    within: Region | None = dataclasses.field(kw_only=True, default=None, repr=False, compare=False)

    @property
    def length(self) -> int:
        return int(self.linear.weight.shape[1])

    def facts(self) -> dict[str, Any]:
        out, width = self.linear.weight.shape
        return {"role": self.role, "in": width, "out": out, "bias": self.linear.bias is not None}


@dataclasses.dataclass
class FeedForward(Region):
    """``y = down(act(gate(x), up(x)))`` or ``y = down(act(up(x)))``, added to a residual stream.

    Ports: ``x`` (..., D) input, ``hidden`` (..., F) input of the down projection, ``y`` (..., D),
    ``stream`` (..., D) the residual stream after ``y`` was added to it.
    Sites: ``ffn`` (the whole region). ``activation`` maps (up,) or (up, gate) to hidden; it is
    elementwise, so neuron i of hidden depends on row i of up and gate only.
    """

    kind: ClassVar[str] = "FeedForward"
    up: LinearWeight = dataclasses.field(kw_only=True)
    gate: LinearWeight | None = dataclasses.field(kw_only=True, default=None)
    down: LinearWeight = dataclasses.field(kw_only=True)
    activation: Program = dataclasses.field(kw_only=True)
    activation_name: str = dataclasses.field(kw_only=True, default="?")

    @property
    def width(self) -> int:
        """D: features of x and y."""
        return int(self.up.weight.shape[1])

    @property
    def tensors(
        self,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Weights of up, gate and down, then their biases, as ``from_dense`` takes them."""
        up, gate, down = self.up, self.gate, self.down
        weight, bias = (None, None) if gate is None else (gate.weight, gate.bias)
        return up.weight, weight, down.weight, up.bias, bias, down.bias

    @property
    def hidden(self) -> int:
        """F: neurons."""
        return int(self.up.weight.shape[0])

    @property
    def length(self) -> int:
        return self.width + self.hidden

    def facts(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "hidden": self.hidden,
            "gated": self.gate is not None,
            "activation": self.activation_name,
            "bias": self.up.bias is not None or self.down.bias is not None,
            "fused": self.up.rows is not None,
        }


@dataclasses.dataclass
class Attention(Region):
    """``y = out(concat_h softmax(score(q_h, k_g(h))) v_g(h))``.

    Ports: ``stream`` as in FeedForward (absent without a residual), ``x`` (..., D) input of the
    query projection, ``context`` (..., H*dv) input of the output projection, ``y`` result, and
    ``q`` (B, H, T, d), ``k`` (B, G, S, d), ``v`` (B, G, S, dv) as they enter the scores, plus
    ``score.0`` ... the tensors that ``score`` reads (masks, biases).
    Sites: ``query`` (the projection that yields q rows; absent where rows cannot be told per head),
    ``attend`` (scores, softmax, weighted sum -> (B, H, T, dv)), ``output`` (the projection).
    A splice may also replace a projection by the role of its part (``key``, ``value``,
    ``query+key+value``), and read what it reads (``key.x``).
    ``query`` is the query role alone, ``projection`` the whole projection that holds it (with key
    and value rows where they are fused), ``query_rows`` (H, r) the rows of each head in
    ``projection``.
    ``time_major``: rows of ``x`` and ``context`` run over (T, B), not (B, T).
    ``score`` maps raw ``q k^T`` (..., T, S) and the score operands to probabilities, row by row.
    """

    kind: ClassVar[str] = "Attention"
    heads: int = dataclasses.field(kw_only=True)
    kv_heads: int = dataclasses.field(kw_only=True)
    head_dim: int = dataclasses.field(kw_only=True)
    value_dim: int = dataclasses.field(kw_only=True)
    query: LinearWeight = dataclasses.field(kw_only=True)
    projection: LinearWeight = dataclasses.field(kw_only=True)
    query_rows: Tensor | None = dataclasses.field(kw_only=True, default=None)
    key: LinearWeight | None = dataclasses.field(kw_only=True, default=None)
    value: LinearWeight | None = dataclasses.field(kw_only=True, default=None)
    output: LinearWeight = dataclasses.field(kw_only=True)
    output_columns: Tensor = dataclasses.field(kw_only=True)
    score: Program = dataclasses.field(kw_only=True)
    score_operands: tuple[str, ...] = dataclasses.field(kw_only=True, default=())
    causal: bool = dataclasses.field(kw_only=True, default=False)
    time_major: bool = dataclasses.field(kw_only=True, default=False)
    cross: bool = dataclasses.field(kw_only=True, default=False)
    spelled: str = dataclasses.field(kw_only=True, default="sdpa")

    @property
    def width(self) -> int:
        """D: features of x."""
        return int(self.query.weight.shape[1])

    @property
    def sizes(self) -> dict[str, Any]:
        """What modules at the site ``attend`` are told, by the names of their arguments."""
        names = ("heads", "kv_heads", "head_dim", "value_dim", "causal")
        return {name: getattr(self, name) for name in names}

    @property
    def length(self) -> int:
        return self.width + self.head_dim + int(self.output.weight.shape[1]) + 64

    def facts(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "spelled": self.spelled,
            "cross": self.cross,
            "fused": self.query.rows is not None,
            "bias": self.query.bias is not None or self.output.bias is not None,
        }


@dataclasses.dataclass
class Layer(Region):
    """One of a run of isomorphic blocks: a slice of the graph with one stream in and one out.

    Ports: ``x`` (B, T, D) the stream before it, ``y`` (B, T, D) after it. Sites: ``layer``, whose
    nodes are known once :func:`sparsify.bodies.take_body` took them out. ``inside``: the attention
    and feed-forward regions in it. ``gm``: the graph it lies in.
    """

    kind: ClassVar[str] = "Layer"
    gm: fx.GraphModule = dataclasses.field(kw_only=True, repr=False)
    inside: tuple[Region, ...] = dataclasses.field(kw_only=True, default=(), repr=False)
    width: int = dataclasses.field(kw_only=True, default=0)

    def facts(self) -> dict[str, Any]:
        return {"width": self.width, "regions": len(self.inside)}


@dataclasses.dataclass
class Stack(Region):
    """A run of isomorphic blocks, each one's stream out being the next one's stream in.

    Ports: ``x`` the stream before the first block, ``y`` after the last, ``x.1`` ... before the
    other blocks. Sites: ``layer.0``, ... one per block (see :class:`Layer`).
    """

    kind: ClassVar[str] = "Stack"
    layers: tuple[Layer, ...] = dataclasses.field(kw_only=True, repr=False)

    @property
    def width(self) -> int:
        """D: features of the stream."""
        return self.layers[0].width

    def facts(self) -> dict[str, Any]:
        return {"layers": len(self.layers), **self.layers[0].facts()}


@dataclasses.dataclass(frozen=True)
class Block:
    """One of a run of isomorphic blocks: the regions it holds, and its place in the run."""

    path: str
    index: int
    count: int
    regions: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """A candidate the matcher did not take: ``role`` failed for ``reason``."""

    kind: str
    path: str
    role: str
    reason: str
    where: str


@dataclasses.dataclass
class Matches:
    """All that the matcher found in one graph, in execution order.

    Attributes:
        regions: attention and feed-forward layers.
        stacks: runs of repeated blocks with one stream through them.
    """

    regions: list[Region]
    near_misses: list[NearMiss]
    blocks: list[Block]
    stacks: list[Stack] = dataclasses.field(default_factory=list)

    @property
    def all_regions(self) -> list[Region]:
        """The regions, the parts inside them, and the stacks and layers that hold them."""
        parts = (part for region in self.regions for part in region.parts)
        layers = (layer for stack in self.stacks for layer in stack.layers)
        return [*self.regions, *parts, *layers, *self.stacks]

    def of(self, kind: type[Any]) -> list[Region]:
        """All regions of one type."""
        return [region for region in self.all_regions if isinstance(region, kind)]
