"""How many bits each expert of a layer gets, from what it would lose.

MC-MoE (arXiv:2410.06270) weighs an expert's quantisation error by how often it is used and solves
an integer programme per layer: one width per expert, the mean within the budget, the least sum. As
the costs are whole bits, dynamic programming solves it exactly. MoEQuant (arXiv:2505.03804): errors
are estimated on as many tokens for rare experts as for common ones, those with the most affinity.

Shapes: T calibration tokens, D width, N experts of m neurons, W widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.knapsack import Choice, Front
from sparsify.runtime.codes import WIDTHS, quantised, weights_of
from sparsify.runtime.ffn import RoutedFFN

EACH = 128  # tokens per expert that its errors are estimated on
HALF = 0.5  # the budget at which it is counted how often an expert is used


def group_of(module: RoutedFFN, most: int) -> int:
    """The largest group of neighbours, up to ``most``, that divides the layer's width."""
    return max(n for n in range(1, min(most, module.width) + 1) if module.width % n == 0)


def own_tokens(module: RoutedFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """For each expert tokens that use it, and how often tokens do.

    Args:
        x: (T, D).

    Returns:
        int64 (N, n), the same number for every expert: the tokens that score it highest, and for
        shared experts tokens at even distances; and (N,) the share of tokens that use it at HALF.
    """
    router, count = module.router, min(EACH, len(x))
    scores = router.scores(x)
    even = torch.linspace(0, len(x) - 1, count, device=x.device).long()
    tokens = torch.cat([even.expand(router.shared, -1), scores.topk(count, dim=0).indices.T])
    before = router.setting
    router.set_active(HALF, warn=False)
    live = router.live(scores, router.extra_scores(x)).float().mean(0)
    router.setting = before
    return tokens, torch.cat([live.new_ones(router.shared), live])


def losses(module: RoutedFFN, x: Tensor | None, group: int) -> tuple[Tensor, Tensor | None]:
    """What each expert loses at each of WIDTHS.

    Args:
        x: (T, D) or None: without, the squared error of the weights.

    Returns:
        (N, W), squared error of the output times how often it is made, and the importance (N, D)
        that codes were made with: the mean square of the expert's own inputs.
    """
    if x is None:
        return torch.stack([_weight_error(module, width, group) for width in WIDTHS], 1), None
    tokens, often = own_tokens(module, x)
    mine = x[tokens].float()  # (N, n, D)
    importance = mine.square().mean(1)
    whole = _outputs(module, mine, *_matrices(module))
    found = []
    for width in WIDTHS:
        made = _outputs(module, mine, *_coded(module, width, group, importance))
        found.append((made - whole).square().sum(2).mean(1) * often)
    return torch.stack(found, 1), importance


def _matrices(module: RoutedFFN) -> tuple[Tensor, Tensor | None, Tensor]:
    gate = None if module.gate is None else module.gate.float()
    return module.up.float(), gate, module.down.float()


def _coded(
    module: RoutedFFN, width: int, group: int, importance: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N, m, D) each, at one width for all experts."""
    counts = None if importance is None else importance.unsqueeze(1)
    up, gate, down = _matrices(module)

    def coded(weight: Tensor, counts: Tensor | None) -> Tensor:
        return weights_of(*quantised(weight, width, group, counts), weight.dtype)

    return coded(up, counts), None if gate is None else coded(gate, counts), coded(down, None)


def _outputs(module: RoutedFFN, x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
    """x (N, n, D), each expert on its tokens -> (N, n, D)."""
    sums = []
    for weight, bias in ((up, module.up_bias), (gate, module.gate_bias)):
        if weight is not None:
            dots = x @ weight.transpose(1, 2)
            sums.append(dots if bias is None else dots + bias.float().unsqueeze(1))
    return module.activation(*sums) @ down


def _weight_error(module: RoutedFFN, width: int, group: int) -> Tensor:
    """(N,) relative to each matrix, so that none counts more for being large."""
    total = torch.zeros(module.experts, device=module.up.device)
    for whole, made in zip(_matrices(module), _coded(module, width, group, None), strict=True):
        if whole is not None and made is not None:
            total += (made - whole).square().sum((1, 2)) / whole.square().sum().clamp_min(1e-30)
    return total


def allotted(found: Tensor, bits: float) -> tuple[int, ...]:
    """Widths of the experts, ``bits`` on average at most, with the least loss in all.

    Args:
        found: (N, W) losses.
    """
    groups = [
        [Choice(float(w), loss) for w, loss in zip(WIDTHS, row, strict=True)]
        for row in found.tolist()
    ]
    spread = (WIDTHS[-1] - WIDTHS[0]) * len(groups)  # whole bits: the programme is solved exactly
    budget = math.floor(bits * len(groups) + 1e-6)
    best = Front(groups, steps=spread).best(budget)
    assert best is not None  # no budget is below the least width
    return tuple(WIDTHS[choice] for choice in best)


def worst_error(module: RoutedFFN, few: RoutedFFN) -> float:
    """The largest difference of a weight between two layers of one shape."""
    pairs = zip(_matrices(module), _matrices(few), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None)


def histogram(bits: Sequence[int]) -> str:
    """``12 x 3, 40 x 4 bits``."""
    counts = {width: list(bits).count(width) for width in sorted(set(bits))}
    return ", ".join(f"{count} x {width}" for width, count in counts.items()) + " bits"
