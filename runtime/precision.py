"""Moving a graph to another dtype or device, keeping the upcasts that its model meant.

A model captured in float32 has casts that do nothing there ("normalise in float32", "back to the
input's dtype"); capture takes them out and marks the inputs they sat on. In a narrower dtype they
do matter, and a cast is either *up* or *down*: applied to a narrow value it is up, to a wide one
down. Which of the few consistent readings a model follows is found by running its example.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.errors import BadInput
from sparsify.runtime.graph import retarget

CASTS = "casts"  # node.meta: indices into all_input_nodes whose value went through a no-op cast
INSERTED = "inserted_cast"  # node.meta: a cast made here, taken out before the next move


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One way to read the marked casts: may they be upcasts, and do made floats stay wide."""

    up: bool
    wide: bool


_READINGS = (
    _Reading(up=True, wide=True),
    _Reading(up=True, wide=False),
    _Reading(up=False, wide=True),
    _Reading(up=False, wide=False),
)


def move(
    module: fx.GraphModule,
    dtype: torch.dtype | None,
    device: torch.device | None,
    example: Sequence[Tensor],
) -> None:
    """Make the graph run in ``dtype`` on ``device``, once its weights are there.

    BadInput where no reading of its casts runs in ``dtype``.
    """
    for node in [n for n in module.graph.nodes if INSERTED in n.meta]:
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    captured = module.meta.get("dtype")
    retarget(module, dtype=dtype, device=device)
    if dtype is None or not isinstance(captured, torch.dtype):
        return
    narrower = torch.finfo(dtype).bits < torch.finfo(captured).bits
    if not narrower or not example or (device is not None and device.type == "meta"):
        module.recompile()
        return
    error: Exception | None = None
    for reading in _READINGS:
        run = _Run(module, dtype, captured, reading)
        try:
            run(example)
        except Exception as problem:  # an operator meets two dtypes: the reading is wrong
            error = error or problem
            continue
        run.write()
        return
    raise BadInput(
        f"the model cannot be moved to {str(dtype).removeprefix('torch.')}",
        why=f"its graph was captured in {str(captured).removeprefix('torch.')}: {error}",
        help="load the dense model in that dtype and compile it again",
    ) from error


class _Run:
    """One run of the example that decides, cast by cast, what a reading does."""

    def __init__(
        self, module: fx.GraphModule, narrow: torch.dtype, wide: torch.dtype, reading: _Reading
    ) -> None:
        self.module, self.narrow, self.wide, self.reading = module, narrow, wide, reading
        self.casts: dict[tuple[fx.Node, fx.Node], torch.dtype] = {}
        self.stays: dict[fx.Node, dict[int | str, torch.dtype]] = {}
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def __call__(self, example: Sequence[Tensor]) -> None:
        inputs = iter(example)
        last_use = {n: user for user in self.module.graph.nodes for n in user.all_input_nodes}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                value = next(inputs)
                floating = value.is_floating_point()
                self.values[node] = value.to(self._device(), self.narrow if floating else None)
            elif node.op == "output":
                self._check_outputs(node)
            else:
                self.values[node] = self._run(node)
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    self.values.pop(used, None)

    def _device(self) -> torch.device:
        first = next(self.module.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.module)
        seen = {source: self.values[source] for source in node.all_input_nodes}
        for source in self._marked(node):
            value = seen[source]
            if not isinstance(value, Tensor) or value.dtype not in (self.narrow, self.wide):
                continue
            up = value.dtype == self.narrow and self.reading.up
            want = self.wide if up else self.narrow
            if want != value.dtype:
                self.casts[node, source] = want
                seen[source] = value.to(want)
        args = list(fx.map_arg(node.args, lambda n: seen[n]))
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: seen[n]))
        if self.reading.wide and self._makes_floats(node, seen):
            for key, said in node.meta.get("captured", {}).items():
                if said == self.wide:
                    self.stays.setdefault(node, {})[key] = said
                    if isinstance(key, int):
                        args[key] = said
                    else:
                        kwargs[key] = said
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _marked(self, node: fx.Node) -> Iterator[fx.Node]:
        sources = node.all_input_nodes
        for index in node.meta.get(CASTS, ()):
            if index < len(sources):
                yield sources[index]

    def _makes_floats(self, node: fx.Node, seen: dict[fx.Node, Any]) -> bool:
        """Whether floats are made here of integers (positions: 257 is not a bfloat16)."""
        tensors = [value for value in seen.values() if isinstance(value, Tensor)]
        return not any(value.is_floating_point() for value in tensors)

    def _check_outputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            value = self.values[source]
            if isinstance(value, Tensor) and value.dtype == self.wide:
                kept = source.meta.get("val")
                # Wide by intent only where the captured model widened it too.
                if kept is None or kept.dtype == self.wide:
                    raise TypeError(f"the output {source.name} stays {self.wide}")

    def write(self) -> None:
        """Put the decided casts into the graph."""
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        for (node, source), dtype in self.casts.items():
            if (source, dtype) not in made:
                with self.module.graph.inserting_before(node):
                    cast = self.module.graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
                cast.meta = {INSERTED: True, "nn_module_stack": node.meta.get("nn_module_stack")}
                made[source, dtype] = cast
            node.replace_input_with(source, made[source, dtype])
        for node, said in self.stays.items():
            args, kwargs = list(node.args), dict(node.kwargs)
            for key, dtype in said.items():
                if isinstance(key, int):
                    args[key] = dtype
                else:
                    kwargs[key] = dtype
            node.args, node.kwargs = tuple(args), kwargs
        self.module.graph.lint()
        self.module.recompile()
