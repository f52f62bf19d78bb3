"""Bootstrap intervals, paired: the same resamples serve every model that is compared.

Percentile intervals (Efron & Tibshirani 1993). What is drawn are whole texts (or sequences, or
questions), never single tokens: the tokens of one text are alike. Memory does not depend on how
many there are: resamples are made a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.report import Interval, Resampled

Numbers = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
FEWEST = 20  # groups; of fewer, the spread cannot be told
_AT_ONCE = 2**20  # drawn numbers in memory


class Bootstrap:
    """Resamples of a fixed set of groups.

    Args:
        groups: of each row, which group (text) it belongs to; where there are fewer than FEWEST,
            every row is drawn by itself.
        unit: what groups are called, row: what rows are called.
        resamples: how many; seed: of the draws.
    """

    def __init__(
        self,
        groups: Sequence[int],
        *,
        unit: str = "texts",
        row: str = "sequences",
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        _, of_row = np.unique(np.asarray(groups, dtype=np.int64), return_inverse=True)
        count = int(of_row.max()) + 1 if len(of_row) else 0
        if count < FEWEST:
            of_row, unit, count = np.arange(len(groups)), row, len(groups)
        self._group = of_row
        self.count = count
        self.resamples = resamples
        self.seed = seed
        self.unit = unit

    @property
    def possible(self) -> bool:
        """Whether there is more than one group to draw from."""
        return self.count > 1 and self.resamples > 1

    @property
    def facts(self) -> Resampled | None:
        """For the report; None where no interval can be had."""
        if not self.possible:
            return None
        return Resampled(self.unit, self.count, self.resamples, self.seed)

    def sums(self, values: Any) -> Numbers:
        """values (rows, k), or (rows,) -> (resamples, k): their sums in every resample."""
        rows = np.asarray(values, dtype=np.float64)
        rows = rows[:, None] if rows.ndim == 1 else rows
        grouped = np.zeros((self.count, rows.shape[1]))
        np.add.at(grouped, self._group, rows)
        draw = np.random.default_rng(self.seed)
        found = np.empty((self.resamples, rows.shape[1]))
        step = max(_AT_ONCE // max(self.count, 1), 1)
        for start in range(0, self.resamples, step):
            size = min(step, self.resamples - start)
            drawn = draw.integers(0, self.count, size=(size, self.count))
            drawn += np.arange(size)[:, None] * self.count
            times = np.bincount(drawn.ravel(), minlength=size * self.count)
            found[start : start + size] = times.reshape(size, self.count) @ grouped
        return found

    def within(self, statistic: Any) -> Interval | None:
        """The interval of a statistic (resamples,); None where nothing can be drawn."""
        if not self.possible:
            return None
        edge = (1 - LEVEL) / 2
        low, high = np.quantile(np.asarray(statistic, dtype=np.float64), (edge, 1 - edge))
        return Interval(float(low), float(high))

    def mean(self, values: Any) -> Interval | None:
        """The interval of the mean of values (rows,)."""
        if not self.possible:
            return None
        rows = np.asarray(values, dtype=np.float64)
        found = self.sums(np.stack([rows, np.ones_like(rows)], axis=1))
        return self.within(found[:, 0] / found[:, 1])
