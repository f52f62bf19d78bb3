"""Units in a fixed order, of which the first are live: ranks, spans, anything no token chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.cost import Cost
from sparsify.runtime.spec import routed

if TYPE_CHECKING:
    from typing_extensions import Self


@routed
class Prefix(Budgeted):
    """The first ``count`` of ``size`` units are live for every token.

    Args:
        size: number of units that the dial can turn off, most important first.
        options: of :class:`Budgeted`; an error table lets the dial spend a budget for several
            layers where it saves most.
    """

    counts: ClassVar[bool] = False  # the module that holds it counts

    def __init__(self, size: int, *, active: float = 1.0, **options: Any) -> None:
        super().__init__(**{**options, "rule": "prefix"})
        if size < 1:
            raise BadInput(f"{size} units are nothing to choose from")
        self.size = size
        self.set_active(active)

    @property
    def routed(self) -> int:
        """R: units that can be turned off."""
        return self.size

    @property
    def count(self) -> int:
        """Live units, shared ones included."""
        return self.shared + int(self.budget)

    def scores(self, x: Tensor) -> Tensor:
        """(..., R): higher for earlier units, whatever the token."""
        order = torch.arange(self.size, 0, -1, device=x.device, dtype=torch.float32)
        return order.expand(*x.shape[:-1], -1)

    def options(self) -> dict[str, Any]:
        return {"size": self.size, **self.budget_options()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(options["size"], **cls.budget_arguments(options)).restore(options)

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        return Cost()

    def extra_repr(self) -> str:
        return f"first {self.count} of {self.units} units, active={self.active:g}"
