"""How far each input feature of a projection moves what the model says, on calibration text.

To second order, a change ``d`` of a projection's result moves the predicted distribution by a
divergence of ``E[(g . d)^2] / 2``, where ``g`` is the gradient of the log-probability of a token
drawn from that distribution (the Fisher information). Leaving out input j changes the result by
``x_j W[:, j]``, so what counts of a feature is ``x_j^2`` times ``E[(g . W[:, j])^2]``: one number
per feature, on one scale for all matrices of all layers. Only models that predict tokens are asked.

Gradients flow through values only: no weight is changed, and no weight's gradient is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from sparsify.regions import Region

TOKENS = 4096  # of calibration text; the gradient costs two more runs of each


@dataclasses.dataclass
class Sensitivity:
    """Sums of squared slopes over the text seen, for regions that have a ``linear``.

    Args:
        gm: the captured graph, whose first result is logits of tokens (batch, token, words).
        regions: projections; their port ``y`` is the result that is moved.
        seed: of what is drawn.
    """

    gm: fx.GraphModule
    regions: Sequence[Region]
    seed: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        self._draw = torch.Generator().manual_seed(self.seed)
        self._sums: dict[int, Tensor] = {}
        self._nodes = list(dict.fromkeys(region.ports["y"] for region in self.regions))

    def add(self, inputs: Sequence[Tensor], mask: Tensor | None) -> None:
        """One batch of flat graph inputs; ``mask`` (batch, token) of the tokens that count."""
        if self.seen >= TOKENS:
            return
        runner = _Watched(self.gm, set(self._nodes))
        with torch.enable_grad():
            result = runner.run(*inputs)
            first = _first(result)
            aim = self._likelihood(first, mask)
            values = [runner.values[node] for node in self._nodes]
            slopes: Sequence[Tensor | None] = torch.autograd.grad(aim, values, allow_unused=True)
        found = dict(zip(self._nodes, slopes, strict=True))
        for region in self.regions:
            slope = found[region.ports["y"]]
            if slope is None:  # what the first result does not depend on
                continue
            weight = region.linear.weight.detach()  # type: ignore[attr-defined]
            rows = slope.detach().reshape(-1, slope.shape[-1]) @ weight.to(slope.dtype)
            moved = rows.float().square().sum(0)
            before = self._sums.get(id(region))
            self._sums[id(region)] = moved if before is None else before + moved
        self.seen += first.shape[0] * (first.shape[1] if first.dim() > 2 else 1)

    def of(self, region: Region) -> Tensor | None:
        """(1, in) float32: mean square slopes by input features; None where nothing moves."""
        found = self._sums.get(id(region))
        return None if found is None else (found / max(self.seen, 1)).unsqueeze(0)

    def _likelihood(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """The log-probability of a token drawn at every place."""
        flat = logits.float().flatten(0, -2)
        with torch.no_grad():
            draws = torch.rand(len(flat), 1, generator=self._draw).to(flat.device)
            mass = flat.softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(mass, draws * mass[:, -1:]).clamp_max(flat.shape[-1] - 1)
        found = flat.log_softmax(-1).gather(-1, drawn).squeeze(-1)
        return found.sum() if mask is None else (found * mask.flatten()).sum()


class _Watched(fx.Interpreter):
    """Runs the graph and keeps some values, which gradients can be taken at."""

    def __init__(self, gm: fx.GraphModule, watched: set[fx.Node]) -> None:
        super().__init__(gm)
        self.watched = watched
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.watched:
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.values[n] = value
        return value


def _first(result: object) -> Tensor:
    while isinstance(result, tuple | list):
        result = result[0]
    assert isinstance(result, Tensor)
    return result
