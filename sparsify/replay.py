"""Run a graph again from somewhere in the middle.

Where only a late module changed, all that comes before it would compute the same once more. A
recorded run keeps every value that crosses one of a few places (of a language model: the residual
stream, masks, rotary angles), and later runs start there. Nothing is assumed of the architecture:
what crosses a place is read off the graph. What the output does not need is never run.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx


class Replay:
    """One output of one graph on one batch of inputs.

    Args:
        gm: the graph.
        inputs: its flat inputs.
        starts: nodes that later runs may start at.
        output: which of the graph's results is wanted.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Tensor],
        starts: Iterable[fx.Node],
        output: int = 0,
    ) -> None:
        self.gm, self.inputs = gm, list(inputs)
        results = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
        wanted = results[output] if isinstance(results, tuple | list) else results
        assert isinstance(wanted, fx.Node)
        self.wanted = wanted
        needed = _ancestors(wanted)
        self.nodes = [n for n in gm.graph.nodes if n in needed or n.op == "placeholder"]
        self.place = {node: at for at, node in enumerate(self.nodes)}
        self.last_use = dict.fromkeys(self.nodes, -1)
        for at, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                self.last_use[used] = at
        self.last_use[wanted] = len(self.nodes)
        self.starts = sorted({self.place[n] for n in starts if n in self.place})
        self.kept: dict[fx.Node, Any] = {}

    def record(self) -> Tensor:
        """Run it all, and keep what later runs start from."""
        self.kept = {}
        return self._run(0, {}, keep=True)

    def run(self, start: fx.Node) -> Tensor:
        """Run from ``start`` on, on what the recorded run kept before it."""
        if start not in self.place:  # the output does not depend on it
            return self._run(len(self.nodes), self.kept, keep=False)
        return self._run(self.place[start], self.kept, keep=False)

    def _run(self, start: int, before: dict[fx.Node, Any], *, keep: bool) -> Tensor:
        runner = fx.Interpreter(self.gm, garbage_collect_values=False)
        runner.args_iter = iter(self.inputs)
        runner.env = {n: v for n, v in before.items() if self.place[n] < start}
        ends: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            ends.setdefault(self.last_use[node], []).append(node)
        with torch.no_grad():
            for at in range(start, len(self.nodes)):
                node = self.nodes[at]
                runner.env[node] = runner.run_node(node)
                if keep and self._crosses(at, self.last_use[node]):
                    self.kept[node] = runner.env[node]
                for done in ends.get(at, ()):
                    runner.env.pop(done, None)
        found: Tensor = runner.env[self.wanted]
        return found

    def _crosses(self, at: int, last: int) -> bool:
        """Whether a value made at ``at`` and last used at ``last`` is needed from a start on."""
        after = bisect.bisect_right(self.starts, at)
        return last == len(self.nodes) or (after < len(self.starts) and self.starts[after] <= last)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, open_ = {node}, [node]
    while open_:
        for used in open_.pop().all_input_nodes:
            if used not in found:
                found.add(used)
                open_.append(used)
    return found
