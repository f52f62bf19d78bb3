"""What stands in for dead units: a vector per unit, interpolated over the budget.

A dead unit's mean output, given that it is dead, depends on how many units are: at a low budget
good units die too. The table holds vectors fitted at a few budgets; between them they are
interpolated, outside the nearest are used. With everything live nothing is added, so the dense
limit stays exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def at_budget(table: Tensor, budgets: Sequence[float], active: float) -> Tensor:
    """The vectors for a budget.

    Args:
        table: (N, D), or (P, N, D) for P ascending budgets.
        budgets: P numbers; empty for an (N, D) table.
        active: the budget in force.

    Returns:
        (N, D).
    """
    if table.dim() == 2:
        return table
    if active <= budgets[0] or len(budgets) == 1:
        return table[0]
    for low, (a, b) in enumerate(itertools.pairwise(budgets)):
        if active <= b:
            return torch.lerp(table[low], table[low + 1], (active - a) / (b - a))
    return table[-1]
