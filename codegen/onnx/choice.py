"""``routing="auto"``: every routed feed-forward layer in its fastest form, or dense.

Layers of one kind (class, sizes, activation, router) are timed once
(:mod:`sparsify.codegen.onnx.timing`), at the least and the largest budget among them; a layer
between the two lies on the straight line between them, as decoding time grows with the bytes of
live experts. Where no routed form is faster than the dense layer, the layer's dial is turned to one
for the export: the file is as fast, and closer to the dense model. A layer whose experts are copies
of a whole one, or whose weights are not one, has no dense form.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sparsify.codegen.elementwise import canonical
from sparsify.codegen.onnx import timing
from sparsify.codegen.onnx.form_ffn import ways
from sparsify.codegen.onnx.trace import HOW
from sparsify.codegen.plan import working
from sparsify.core import Remark
from sparsify.runtime import dial
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.model import SparseModel

MARGIN = 0.97  # of the dense layer's time: less is no gain that timing can tell from none


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was decided for one layer.

    Attributes:
        path: the layer's region; module: the routed module in it.
        way: its form, a key of :data:`sparsify.codegen.onnx.trace.HOW`.
        times: milliseconds of a call by way, the dense layer's among them where it has one.
        tokens: of a call.
    """

    path: str
    module: str
    way: str
    times: Mapping[str, float]
    tokens: int

    @property
    def reason(self) -> str:
        """What was measured, in words."""
        at = f"at {self.tokens} token{'s' * (self.tokens != 1)} in ONNX Runtime"
        dense = self.times.get("dense")
        routed = min(ms for way, ms in self.times.items() if way != "dense")
        if dense is None:
            return f"{HOW[self.way]} (the fastest of its forms {at}; it has no dense one)"
        if self.way == "dense":
            return f"dense (routed would take {routed / dense:.2f}x of its time {at})"
        return f"{HOW[self.way]} ({routed / dense:.2f}x of the dense layer's time {at})"

    @property
    def remark(self) -> Remark:
        """For a report."""
        if self.way != "dense":
            return Remark("applied", "export", self.path, "FeedForward", self.reason)
        help_ = "fewer and larger experts, a lower budget or target='ort' may pay"
        return Remark("left", "export", self.path, "FeedForward", self.reason, help_)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        times = {way: round(ms, 4) for way, ms in self.times.items()}
        return {"region": self.path, "form": HOW[self.way], "milliseconds": times,
                "tokens": self.tokens, "reason": self.reason}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The form of every layer: ``ways`` by module path, ``way`` for all others."""

    way: str
    ways: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: tuple[Choice, ...] = ()


@contextlib.contextmanager
def chosen(
    model: SparseModel,
    target: str,
    routing: str,
    tokens: int = 1,
    threads: int | None = None,
    *,
    moe: bool = True,
) -> Iterator[Chosen]:
    """What ``routing`` means for ``model``; inside, layers chosen dense have their dials at one.

    Args:
        tokens: of a timed call; threads: of ONNX Runtime there, None = as many as torch has.
        moe: whether ONNX Runtime's operator may be taken.
    """
    if routing != "auto":
        yield Chosen(routing)
        return
    offered = ("mask", "branch", "moe") if target == "ort" and moe else ("mask", "branch")
    found = choices(model, offered, tokens, threads or torch.get_num_threads())
    layers = dict(model.graph.named_modules())
    with dial.kept(model):
        dense = [layers[c.module] for c in found if c.way == "dense"]
        if dense:
            turned = {part: 1.0 for ffn in dense for part in timing.dials(ffn)}
            dial.set_each(model, turned)
        yield Chosen("mask", {c.module: c.way for c in found}, found)


def choices(
    model: SparseModel, offered: tuple[str, ...], tokens: int, threads: int
) -> tuple[Choice, ...]:
    """One per routed layer that is not dense already, in model order."""
    groups: dict[object, list[tuple[str, RoutedFFN]]] = {}
    for path, module in working(model.graph):
        if isinstance(module, RoutedFFN) and ways(module, "mask") != "dense":
            groups.setdefault(_kind(module), []).append((path, module))
    found = [c for group in groups.values() for c in _group(group, offered, tokens, threads)]
    order = [path for path, _ in model.graph.named_modules()]
    return tuple(sorted(found, key=lambda choice: order.index(choice.module)))


def _kind(ffn: RoutedFFN) -> object:
    """What layers whose times are the same have in common."""
    router, inside = ffn.router, ffn.inside
    shapes = tuple((name, p.shape, p.dtype) for name, p in ffn.named_parameters(recurse=False))
    rules = [type(router), str(router.selector), router.shared, router.routed]
    rules += [] if inside is None else [type(inside), str(inside.selector)]
    return type(ffn), shapes, repr(canonical(ffn.activation)), tuple(rules)


def _group(
    group: list[tuple[str, RoutedFFN]], offered: tuple[str, ...], tokens: int, threads: int
) -> list[Choice]:
    first = group[0][1]
    lives = [ffn.router.live_units(ffn.router.active) for _, ffn in group]
    ends = sorted({max(1, round(min(lives))), max(1, round(max(lives)))})
    able = sorted({ways(first, way) for way in offered}, key=list(HOW).index)
    dense = first.router.unit_weights and not first.copies
    timed = timing.measured(first, [*able, "dense"] if dense else able, ends, tokens, threads)
    made = []
    for (path, _), live in zip(group, lives, strict=True):
        times = _between(ends, timed, live)
        routed = min(able, key=lambda way: times[way])
        slow = dense and times[routed] > MARGIN * times["dense"]
        region = path.rpartition(".")[0] or path
        made.append(Choice(region, path, "dense" if slow else routed, times, tokens))
    return made


def _between(ends: list[int], timed: list[dict[str, float]], live: float) -> dict[str, float]:
    """The times at ``live`` experts, on the line through those that were measured."""
    if len(ends) == 1:
        return timed[0]
    part = min(max((live - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)
    return {way: ms + part * (timed[1][way] - ms) for way, ms in timed[0].items()}


def told(found: tuple[Choice, ...]) -> list[str]:
    """A line per reason: its first layer, and how many more."""
    by: dict[str, list[str]] = {}
    for choice in found:
        by.setdefault(choice.reason, []).append(choice.path)
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in by.items()
    ]
