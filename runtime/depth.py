"""Depth: which tokens run a layer, and a layer that runs for those tokens only.

A :class:`DepthRouter` scores tokens and says who runs; a :class:`RoutedLayer` holds one block of
the model as a graph, gathers the tokens that run it, and puts their results back into the stream.
Rows of a batch with as many live (and live cached) tokens run together, others one by one.

Without ``keys``, only live tokens attend and are attended to ("recursion-wise caching", Bae et al.,
arXiv:2507.10524; Mixture of Depths, Raposo et al., arXiv:2404.02258, does the same). The key/value
cache keeps one slot per token in every layer, so its length stays one number; the slot of a token
that skipped the layer holds zeros, which is also the mark by which later steps leave it out. With
``keys``, live tokens attend to those of all tokens, made outside the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify.runtime.budget import Budgeted
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import join_graph
from sparsify.runtime.graph import assemble, attach, graph_from_json, graph_to_json
from sparsify.runtime.router import as_parameter
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, from_spec, is_routed, routed

if TYPE_CHECKING:
    from typing_extensions import Self

EPS = 1e-6


def straight_through(scores: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """One where live, else 0; where live, with the gradient of the score's sigmoid."""
    if not scores.requires_grad:
        return live.to(dtype)
    s = torch.sigmoid(scores)
    return torch.where(live, 1 + (s - s.detach()), 0.0).to(dtype)


@routed
class DepthRouter(Budgeted):
    """Which tokens run a layer: one score per token, of its direction ``x / rms(x)``.

    Args:
        weight: (1, D); bias: (1,) or None.
        options: of :class:`Budgeted`. ``threshold`` judges every token alone: safe for causal
            models and for decoding. ``top-k`` is expert choice: the best tokens of each sequence,
            which looks at the whole sequence.
    """

    counts: ClassVar[bool] = False  # the layers count
    own: ClassVar[tuple[str, ...]] = ()  # a subclass's further arguments, stored as they are

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        active: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        train = weight.requires_grad or not isinstance(weight, nn.Parameter)
        self.weight = as_parameter(weight, train)
        zeros = weight.new_zeros(weight.shape[0])
        self.bias = as_parameter(zeros if bias is None else bias, train)
        self.set_active(active)

    @property
    def routed(self) -> int:
        """One: the layer."""
        return 1

    def wanted(self, active: float) -> float:
        """The share of tokens that run the layer: not rounded to all or none."""
        return min(max(active, 0.0), 1.0)

    @property
    def budget(self) -> float:
        return self.wanted(self.active)

    def set_active(self, active: float, *, k_exact: int | None = None, warn: bool = True) -> None:
        """As for every dial; a number of units per token (``k_exact``) has no meaning here."""
        super().set_active(active, warn=warn)

    def scores(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, 1)."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return nn.functional.linear(unit, self.weight.to(wide.dtype), self.bias.to(wide.dtype))

    def live(self, scores: Tensor, extra: Tensor | None = None) -> Tensor:
        """scores (B, T, 1) -> bool (B, T, 1)."""
        if self.budget >= 1 or self.rule != "top-k":
            return super().live(scores)
        kept = math.floor(self.budget * scores.shape[1] + 0.5)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :kept], True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> select (B, T, 1), 0 where dead, else one (straight-through)."""
        if self.all_live and not self.follows(x):
            return x.new_ones((*x.shape[:-1], 1))
        scores = self.scores(x)
        return straight_through(scores, self.live(scores), x.dtype)

    def follows(self, x: Tensor) -> bool:
        """Whether autograd follows the scores of ``x``."""
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)

    def options(self) -> dict[str, Any]:
        return {
            "width": self.weight.shape[1],
            "dtype": dtype_name(self.weight.dtype),
            **{name: getattr(self, name) for name in self.own},
            **self.budget_options(),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        weight = torch.empty(1, options["width"], dtype=dtype_of(options["dtype"]))
        more = {name: options[name] for name in cls.own}
        return cls(weight, **more, **cls.budget_arguments(options)).restore(options)

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        if (self.active if active is None else active) >= 1:
            return Cost()
        weights = self.weight.numel()
        return Cost(2 * weights, (weights + 1) * self.weight.element_size())

    def extra_repr(self) -> str:
        return f"{self.rule}, active={self.active:g}"


@routed
class RoutedLayer(RoutedModule):
    """One block of the model, run for the tokens that are live in it.

    Args:
        body: graph with inputs ``rows``, ``tokens``, ``past`` (ints: the sizes it runs with), the
            stream, then the other inputs; output (stream, *grown cache entries). Its routed
            modules lie under ``inner``.
        axes: for the stream and every other input, one letter per dimension: ``b`` batch, ``t``
            token, ``s`` cached token, ``k`` cached and new tokens, ``.`` anything else.
        slots: (input, dimension) of the cache entry that each further output grows; the input's
            number counts the stream as 0.
        keys: (input, dimension) of keys of all tokens that come from outside: live tokens attend
            to all of them, and the layer makes no cache entries; None = live tokens attend to live
            tokens.
        unit: which unit of the selection says who is live.
        dropped: (D,) what a token that skips the layer gets added; None = nothing.
        flops, weight_bytes: dense work of one token, routed modules inside not counted.
        attention: (query heads * (key + value width), cache bytes) per key attended to.
    """

    def __init__(
        self,
        body: fx.Graph,
        inner: nn.Module,
        *,
        axes: Sequence[str],
        slots: Sequence[tuple[int, int]] = (),
        keys: Sequence[int] | None = None,
        unit: int = 0,
        dropped: Tensor | None = None,
        flops: float = 0.0,
        weight_bytes: float = 0.0,
        attention: tuple[float, float] = (0.0, 0.0),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        # Not a registered child: its modules are those of ``inner``, it has no weights.
        self.__dict__["body"] = assemble(body, inner)
        self.body.meta["dtype"] = dtype
        self.axes = tuple(axes)
        self.slots = tuple((int(a), int(b)) for a, b in slots)
        self.keys = None if keys is None else (int(keys[0]), int(keys[1]))
        self.unit = unit
        self.dropped = None if dropped is None else as_parameter(dropped)
        self.flops, self.weight_bytes = flops, weight_bytes
        self.attention = attention
        # An input with a token dimension but no batch dimension is one row's alone.
        self.alone = any("b" not in a and set(a) & set("tsk") for a in self.axes)

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """Graphs that follow the model's dtype and device (sparsify.runtime.graph.retarget)."""
        body: fx.GraphModule = self.__dict__["body"]
        return (body,)

    @property
    def body(self) -> fx.GraphModule:
        """The block."""
        return self.graphs[0]

    def forward(self, select: Tensor, *inputs: Tensor) -> Any:
        """select (B, T, N), the stream (B, T, D), other inputs -> stream, or (stream, *cache)."""
        x = inputs[0]
        batch, tokens, _ = x.shape
        weight = select.expand(batch, tokens, -1)[..., self.unit]
        live = weight != 0
        past = inputs[self.slots[0][0]].shape[self.slots[0][1]] if self.slots else 0
        seen = 0
        if self.keys is not None:
            seen = inputs[self.keys[0]].shape[self.keys[1]]
            past = seen - tokens
        cached = self._cached(inputs, batch, past)
        count = int(live.sum())
        self.counter.seen(batch * tokens, 1, count)
        if self.dispatch == "auto" and count == batch * tokens and bool(cached.all()):
            self.counter.rows += count
            y, *grown = self.body(batch, tokens, past, *inputs)
            if weight.requires_grad:
                y = y * weight[..., None] + x * (1 - weight[..., None])
            return (y, *grown) if self.slots else y
        y = x if self.dropped is None else x + self.dropped * (~live)[..., None]
        grown = [self._room(inputs[at], dim, tokens) for at, dim in self.slots]
        for rows, new, old in self._groups(live, cached):
            taken = [
                self._take(v, a, rows, new, old, past)
                for v, a in zip(inputs, self.axes, strict=True)
            ]
            self.counter.rows += new.numel()
            before = old.shape[1] if self.keys is None else seen - new.shape[1]
            out, *entries = self.body(len(rows), new.shape[1], before, *taken)
            if weight.requires_grad:
                w = weight[rows[:, None], new][..., None]
                out = out * w + taken[0] * (1 - w)
            y = y.index_put((rows[:, None], new), out.to(y.dtype))
            for number, (entry, (_, dim)) in enumerate(zip(entries, self.slots, strict=True)):
                made = entry.narrow(dim, old.shape[1], new.shape[1]).movedim(dim, 1)
                room = grown[number].movedim(dim, 1)
                room = room.index_put((rows[:, None], past + new), made.to(room.dtype))
                grown[number] = room.movedim(1, dim)
        y = join_graph(y, select)
        return (y, *grown) if self.slots else y

    def _cached(self, inputs: Sequence[Tensor], batch: int, past: int) -> Tensor:
        """(B, S) bool: cached tokens that ran this layer."""
        if not self.slots:
            return inputs[0].new_ones((batch, 0), dtype=torch.bool)
        at, dim = self.slots[0]
        entries = inputs[at].movedim(dim, 1)
        return (entries != 0).flatten(2).any(-1) if past else entries.new_ones((batch, 0)).bool()

    @staticmethod
    def _room(entry: Tensor, dim: int, tokens: int) -> Tensor:
        """The cache entry with empty slots for the new tokens."""
        shape = list(entry.shape)
        shape[dim] = tokens
        return torch.cat([entry, entry.new_zeros(shape)], dim=dim)

    def _groups(self, live: Tensor, cached: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(rows (n,), live tokens (n, K), live cached tokens (n, S)) of rows that run together."""
        sizes = torch.stack([live.sum(1), cached.sum(1)], 1).tolist()
        together: dict[Any, list[int]] = {}
        for row, (new, old) in enumerate(sizes):
            if new:
                together.setdefault((new, old, row if self.alone else 0), []).append(row)
        found = []
        for (new, old, _), members in together.items():
            rows = torch.tensor(members, device=live.device)
            n = len(members)
            found.append(
                (
                    rows,
                    live[rows].nonzero()[:, 1].view(n, new),
                    cached[rows].nonzero()[:, 1].view(n, old),
                )
            )
        return found

    @staticmethod
    def _take(
        value: Tensor, axes: str, rows: Tensor, new: Tensor, old: Tensor, past: int
    ) -> Tensor:
        """The part of an input that these rows and tokens read."""
        if "b" in axes:
            value = value.index_select(axes.index("b"), rows)
        places = {"t": new, "s": old, "k": torch.cat([old, past + new], 1)}
        for dim, axis in enumerate(axes):
            if axis not in places:
                continue
            index = places[axis]
            shape = [1] * value.dim()
            shape[dim] = index.shape[1]
            if "b" in axes:
                shape[axes.index("b")] = len(rows)
                value = torch.take_along_dim(value, index.view(shape), dim)
            else:
                value = value.index_select(dim, index[0])
        return value

    def options(self) -> dict[str, Any]:
        modules = {
            path: module.spec()
            for path, module in self.inner.named_modules()
            if isinstance(module, RoutedModule) and _outermost(self.inner, path)
        }
        return {
            "body": graph_to_json(self.body),
            "modules": modules,
            "axes": list(self.axes),
            "slots": [list(slot) for slot in self.slots],
            "keys": None if self.keys is None else list(self.keys),
            "unit": self.unit,
            "dropped": None if self.dropped is None else len(self.dropped),
            "dtype": None if self.dropped is None else dtype_name(self.dropped.dtype),
            "flops": self.flops,
            "weight_bytes": self.weight_bytes,
            "attention": list(self.attention),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        inner = nn.Module()
        for path, spec in options["modules"].items():
            attach(inner, path, from_spec(spec))
        body = graph_from_json(options["body"], inner)
        width = options["dropped"]
        return cls(
            body.graph,
            inner,
            axes=options["axes"],
            slots=options["slots"],
            keys=options.get("keys"),
            unit=options["unit"],
            dropped=None if width is None else torch.empty(width, dtype=dtype_of(options["dtype"])),
            flops=options["flops"],
            weight_bytes=options["weight_bytes"],
            attention=tuple(options["attention"]),
            dtype=body.meta["dtype"],
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = 1.0 if active is None else active
        per_key, cache = self.attention
        keys = context * (share if self.keys is None else 1.0)
        total = Cost(
            share * (self.flops + 2 * keys * per_key),
            share * self.weight_bytes,
            share * keys * cache,
        )
        for path, module in self.inner.named_modules():
            if is_routed(module) and _outermost(self.inner, path):
                assert isinstance(module, RoutedModule)
                own = getattr(module, "active", None)
                part = module.cost(own, context)
                total += Cost(share * part.flops, share * part.bytes, share * part.cache)
        return total

    def extra_repr(self) -> str:
        return f"unit {self.unit}, {len(self.axes)} inputs, {len(self.slots)} cache entries"


def _outermost(root: nn.Module, path: str) -> bool:
    """Whether no routed module lies above the one at ``path``."""
    parts = path.split(".")
    above = (root.get_submodule(".".join(parts[:n])) for n in range(1, len(parts)))
    return bool(path) and not any(is_routed(module) for module in above)
