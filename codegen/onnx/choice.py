"""``routing="auto"``: every routed feed-forward layer in its fastest form, or dense.

Layers of one kind (class, sizes, activation, router) are timed once
(:mod:`sparsify.codegen.onnx.timing`), with as many experts live as the layer with the fewest and
the one with the most has in use (:mod:`sparsify.codegen.onnx.live`; where that cannot be counted,
by its budget). A layer between the two lies on the straight line between them, as decoding time
grows with the bytes of live experts. Where no routed form is faster than the dense layer, the
layer's dial is turned to one for the export: the file is as fast, and closer to the dense model. A
layer whose experts are copies of a whole one, or whose weights are not one, has no dense form.

Where both take about as long it does not matter which is written. What matters is how many experts
are live: SmolLM2's layers break even at 32 of 64 on two threads, and by their budgets half of them
have more, in use few.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sparsify.codegen.elementwise import canonical
from sparsify.codegen.onnx import live, timing
from sparsify.codegen.onnx.asked import Asked
from sparsify.codegen.onnx.chain import dials
from sparsify.codegen.onnx.custom.product import FEW
from sparsify.codegen.onnx.form_ffn import ways
from sparsify.codegen.onnx.targets import BITS, OFFERED
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
        asked: of which calls; live: experts that a token of them uses.
    """

    path: str
    module: str
    way: str
    times: Mapping[str, float]
    asked: Asked
    live: float = 0.0

    @property
    def ratio(self) -> float | None:
        """The fastest routed form's time over the dense layer's; None where there is no such."""
        dense = self.times.get("dense")
        return dense and min(ms for way, ms in self.times.items() if way != "dense") / dense

    @property
    def reason(self) -> str:
        """What was measured, in words."""
        return _reason(self, "" if self.ratio is None else f"{self.ratio:.2f}x")

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
                "live": round(self.live, 1),
                "tokens": self.asked.tokens, "threads": self.asked.threads,
                "weights": self.asked.weights, "reason": self.reason}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The form of every layer: ``ways`` by module path, ``way`` for all others."""

    way: str
    ways: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: tuple[Choice, ...] = ()


@contextlib.contextmanager
def chosen(model: SparseModel, asked: Asked) -> Iterator[Chosen]:
    """What ``asked.routing`` means for ``model``; inside, layers chosen dense have their dials at
    one."""
    if asked.routing != "auto":
        yield Chosen(asked.routing)
        return
    able = offered(asked)
    found = choices(model, able, asked)
    layers = dict(model.graph.named_modules())
    with dial.kept(model):
        dense = [layers[c.module] for c in found if c.way == "dense"]
        if dense:
            turned = {part: 1.0 for ffn in dense for part in dials(ffn)}
            dial.set_each(model, turned)
        rest = "custom" if "custom" in able and asked.tokens <= FEW else "mask"
        yield Chosen(rest, {c.module: c.way for c in found}, found)


def offered(asked: Asked) -> tuple[str, ...]:
    """Ways to choose from; our operators read no codes."""
    floats = asked.weights not in BITS
    return tuple(way for way in OFFERED[asked.target] if floats or way != "custom")


def choices(model: SparseModel, ways_: tuple[str, ...], asked: Asked) -> tuple[Choice, ...]:
    """One per routed layer that is not dense already, in model order."""
    groups: dict[object, list[tuple[str, RoutedFFN]]] = {}
    for path, module in working(model.graph):
        if isinstance(module, RoutedFFN) and ways(module, "mask") != "dense":
            groups.setdefault(_kind(module), []).append((path, module))
    used = live.shares(model) if groups else {}
    found = [c for group in groups.values() for c in _group(group, ways_, asked, used)]
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
    group: list[tuple[str, RoutedFFN]],
    ways_: tuple[str, ...],
    asked: Asked,
    used: Mapping[str, float],
) -> list[Choice]:
    first = group[0][1]
    lives = [
        used[path] * ffn.experts if path in used else ffn.router.live_units(ffn.router.active)
        for path, ffn in group
    ]
    ends = sorted({max(1, round(min(lives))), max(1, round(max(lives)))})
    able = sorted({ways(first, way) for way in ways_}, key=list(HOW).index)
    dense = first.router.unit_weights and not first.copies
    timed = timing.measured(first, [*able, "dense"] if dense else able, ends, asked)
    made = []
    for (path, _), count in zip(group, lives, strict=True):
        times = _between(ends, timed, count)
        routed = min(able, key=lambda way: times[way])
        slow = dense and times[routed] > MARGIN * times["dense"]
        region = path.rpartition(".")[0] or path
        made.append(Choice(region, path, "dense" if slow else routed, times, asked, count))
    return made


def _between(ends: list[int], timed: list[dict[str, float]], live: float) -> dict[str, float]:
    """The times at ``live`` experts, on the line through those that were measured."""
    if len(ends) == 1:
        return timed[0]
    part = min(max((live - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)
    return {way: ms + part * (timed[1][way] - ms) for way, ms in timed[0].items()}


def told(found: tuple[Choice, ...]) -> list[str]:
    """A line for each form that was chosen: its first layer, how many more, and why."""
    by: dict[tuple[str, bool], list[Choice]] = {}
    for choice in found:
        by.setdefault((choice.way, choice.ratio is None), []).append(choice)
    lines = []
    for group in by.values():
        ratios = [f"{ratio:.2f}x" for ratio in sorted(c.ratio or 0.0 for c in group)]
        span = " to ".join(dict.fromkeys((ratios[0], ratios[-1])))
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        lines.append(f"{group[0].path}{more}: {_reason(group[0], span)}")
    return lines


def _reason(choice: Choice, ratio: str) -> str:
    at = f"at {choice.asked.calls} in ONNX Runtime"
    if choice.ratio is None:
        return f"{HOW[choice.way]} (the fastest of its forms {at}; it has no dense one)"
    if choice.way == "dense":
        return f"dense (routed would take {ratio} of its time {at})"
    return f"{HOW[choice.way]} ({ratio} of the dense layer's time {at})"
