"""Routed projections: blocks of output rows or of input columns, one block per unit.

``RoutedRows`` computes, for every token, only the output blocks of its live units (the query rows
of live heads); ``RoutedColumns`` reads only the input blocks of its live units (the output
projection's columns of live heads). Both keep their weights block after block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.cost import Cost
from sparsify.runtime.dispatch import Sum, join_graph, plan
from sparsify.runtime.router import as_parameter, own
from sparsify.runtime.spec import RoutedModule, dtype_name, dtype_of, routed

if TYPE_CHECKING:
    from typing_extensions import Self

linear = torch.nn.functional.linear


@routed
class RoutedRows(RoutedModule):
    """A projection whose output rows belong to units; rows of dead units are zero.

    Args:
        blocks: (H, r, in), the rows of each unit.
        others: (O, in), rows that are always computed (O may be 0).
        bias: (H, r) and other_bias: (O,), or None.
        places: int64 (H*r + O,): output feature of every packed row, units first; None = in order.
    """

    places: Tensor | None

    def __init__(
        self,
        blocks: Tensor,
        others: Tensor | None = None,
        bias: Tensor | None = None,
        other_bias: Tensor | None = None,
        *,
        places: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.blocks = as_parameter(blocks)
        self.others = None if others is None or not len(others) else as_parameter(others)
        self.bias = None if bias is None else as_parameter(bias)
        self.other_bias = (
            None if other_bias is None or self.others is None else as_parameter(other_bias)
        )
        self.register_buffer("places", places)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        unit_rows: Tensor,
        other_rows: Tensor | None = None,
    ) -> Self:
        """From weight (out, in), bias (out,), unit_rows int64 (H, r) and other_rows int64 (O,).

        ``other_rows`` None = all rows that no unit owns.
        """
        out = weight.shape[0]
        places, owned = partition(unit_rows, other_rows, out, "rows")
        weight_packed = weight.detach()[places].requires_grad_(weight.requires_grad)
        packed = None if bias is None else bias.detach()[places].requires_grad_(bias.requires_grad)
        ordered = torch.equal(places, torch.arange(out, device=places.device))
        return cls(
            weight_packed[:owned].reshape(*unit_rows.shape, -1),
            weight_packed[owned:],
            None if packed is None else packed[:owned].reshape(unit_rows.shape),
            None if packed is None else packed[owned:],
            places=None if ordered else places,
        )

    @property
    def units(self) -> int:
        """H."""
        return int(self.blocks.shape[0])

    def forward(self, x: Tensor, select: Tensor) -> Tensor:
        """x (..., in), select (..., H) -> (..., out)."""
        found: Tensor | None = self.lowered(x, select)
        if found is not None:
            return found
        rows = x.reshape(-1, x.shape[-1])
        work = plan(select.reshape(-1, self.units), fuse=self.dispatch == "auto")
        self.counter.seen(work.tokens, work.units, work.live)
        width = self.blocks.shape[1]
        done, at = [], []
        blocks, biases = work.split(self.blocks), work.split(self.bias)
        numbers = torch.arange(work.tokens, device=x.device)
        for segment, block, bias in zip(work.segments, blocks, biases, strict=True):
            if not segment.count:
                continue
            assert block is not None
            mine = rows if segment.rows is None else rows.index_select(0, segment.rows)
            offset = None if bias is None else bias.flatten()
            done.append(linear(mine, block.flatten(0, 1), offset).view(-1, width))
            self.counter.rows += len(mine) * segment.size
            tokens = numbers if segment.rows is None else segment.rows
            units = torch.arange(segment.start, segment.start + segment.size, device=x.device)
            at.append((tokens.unsqueeze(1) * self.units + units).flatten())
        if len(done) == 1 and work.all_live:
            y = done[0].view(work.tokens, self.units * width)
        else:
            y = x.new_zeros(work.tokens * self.units, width)
            if done:
                y = y.to(done[0].dtype).index_copy(0, torch.cat(at), torch.cat(done))
            y = y.view(work.tokens, self.units * width)
        if self.others is not None:
            y = torch.cat([y, linear(rows, self.others, self.other_bias)], dim=1)
        if self.places is not None:
            y = torch.zeros_like(y).index_copy(1, self.places, y)
        return join_graph(y, x, self.blocks).view(*x.shape[:-1], y.shape[1])

    def dense_weights(self) -> dict[str, Tensor]:
        with torch.no_grad():
            found = {"weight": self._unpack(self.blocks.flatten(0, 1), self.others)}
            if self.bias is not None:
                found["bias"] = self._unpack(self.bias.flatten(), self.other_bias)
        return found

    def _unpack(self, rows: Tensor, others: Tensor | None) -> Tensor:
        packed = rows if others is None else torch.cat([rows, others])
        if self.places is None:
            return packed
        return torch.empty_like(packed).index_copy_(0, self.places, packed)

    def options(self) -> dict[str, Any]:
        return {
            "units": self.units,
            "rows": self.blocks.shape[1],
            "inputs": self.blocks.shape[2],
            "others": 0 if self.others is None else len(self.others),
            "bias": self.bias is not None,
            "places": self.places is not None,
            "dtype": dtype_name(self.blocks.dtype),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        h, r, o, d = (options[k] for k in ("units", "rows", "others", "inputs"))
        dtype = dtype_of(options["dtype"])
        return cls(
            torch.empty(h, r, d, dtype=dtype),
            torch.empty(o, d, dtype=dtype),
            torch.empty(h, r, dtype=dtype) if options["bias"] else None,
            torch.empty(o, dtype=dtype) if options["bias"] else None,
            places=torch.empty(h * r + o, dtype=torch.int64) if options["places"] else None,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = 1.0 if active is None else active
        others = 0 if self.others is None else self.others.numel()
        weights = share * self.blocks.numel() + others
        return Cost(2 * weights, weights * self.blocks.element_size())

    def extra_repr(self) -> str:
        h, r, d = self.blocks.shape
        return f"{h} units of {r} rows, in={d}"


@routed
class RoutedColumns(RoutedModule):
    """A projection whose input columns belong to units; those of dead units are not read.

    Args:
        blocks: (H, c, out), the columns of each unit, transposed.
        bias: (out,) or None.
        dropped: (H, out) or None: added for every unit that a token does not use; vanishes when
            all are live.
        places: int64 (H*c,): input feature of every packed column; None = in order.
    """

    places: Tensor | None

    def __init__(
        self,
        blocks: Tensor,
        bias: Tensor | None = None,
        *,
        dropped: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.blocks = as_parameter(blocks)
        self.bias = None if bias is None else as_parameter(bias)
        self.dropped = None if dropped is None else as_parameter(dropped)
        self.register_buffer("places", places)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        unit_columns: Tensor,
        dropped: Tensor | None = None,
    ) -> Self:
        """From weight (out, in), bias (out,) and unit_columns int64 (H, c), which cover the input.

        Raises BadInput where they do not.
        """
        columns = weight.shape[1]
        places, owned = partition(unit_columns, None, columns, "columns")
        if owned != columns:
            raise BadInput(f"{columns - owned} of {columns} input columns belong to no unit")
        packed = weight.detach().t()[places].reshape(*unit_columns.shape, -1)
        ordered = torch.equal(places, torch.arange(columns, device=places.device))
        return cls(
            packed.requires_grad_(weight.requires_grad),
            None if bias is None else own(bias),
            dropped=dropped,
            places=None if ordered else places,
        )

    @property
    def units(self) -> int:
        """H."""
        return int(self.blocks.shape[0])

    def forward(self, z: Tensor, select: Tensor) -> Tensor:
        """z (..., in), select (..., H) -> (..., out)."""
        found: Tensor | None = self.lowered(z, select)
        if found is not None:
            return found
        units, width, out = self.blocks.shape
        flat = z.reshape(-1, units * width)
        chosen = select.reshape(-1, units)
        if self.places is not None:
            flat = flat.index_select(1, self.places)
        work = plan(chosen, fuse=self.dispatch == "auto")
        self.counter.seen(work.tokens, work.units, work.live)
        total = Sum(work.tokens, self.bias, out, z)
        weights = work.pairs(chosen)
        blocks, inputs = work.split(self.blocks), work.split(flat.view(-1, units, width), 1)
        for segment, block, part, weight in zip(
            work.segments, blocks, inputs, weights, strict=True
        ):
            if not segment.count:
                continue
            assert block is not None
            assert part is not None
            mine = part if segment.rows is None else part.index_select(0, segment.rows)
            scaled = mine * weight.to(total.dtype).unsqueeze(2)
            total.add(segment.rows, scaled.flatten(1), block.flatten(0, 1))
            self.counter.rows += len(mine) * segment.size
        if self.dropped is not None and not work.all_live:
            total.add(None, ~work.mask, self.dropped)
        y = join_graph(total.value(), z, self.blocks).to(z.dtype)
        return y.view(*z.shape[:-1], out)

    def dense_weights(self) -> dict[str, Tensor]:
        with torch.no_grad():
            packed = self.blocks.flatten(0, 1)
            if self.places is not None:
                packed = torch.empty_like(packed).index_copy_(0, self.places, packed)
            found = {"weight": packed.t()}
            if self.bias is not None:
                found["bias"] = self.bias.detach()
        return found

    def options(self) -> dict[str, Any]:
        return {
            "units": self.units,
            "columns": self.blocks.shape[1],
            "outputs": self.blocks.shape[2],
            "bias": self.bias is not None,
            "dropped": self.dropped is not None,
            "places": self.places is not None,
            "dtype": dtype_name(self.blocks.dtype),
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        h, c, o = (options[k] for k in ("units", "columns", "outputs"))
        dtype = dtype_of(options["dtype"])
        return cls(
            torch.empty(h, c, o, dtype=dtype),
            torch.empty(o, dtype=dtype) if options["bias"] else None,
            dropped=torch.empty(h, o, dtype=dtype) if options["dropped"] else None,
            places=torch.empty(h * c, dtype=torch.int64) if options["places"] else None,
        )

    def cost(self, active: float | None = None, context: int = 0) -> Cost:
        share = 1.0 if active is None else active
        weights = share * self.blocks.numel()
        if self.dropped is not None and share < 1:
            weights += self.dropped.numel()
        return Cost(2 * weights, weights * self.blocks.element_size())

    def extra_repr(self) -> str:
        h, c, o = self.blocks.shape
        return f"{h} units of {c} columns, out={o}"


def partition(units: Tensor, others: Tensor | None, size: int, what: str) -> tuple[Tensor, int]:
    """Places of all ``size`` rows (or columns), those of units first, and how many units own.

    Raises BadInput unless every row has exactly one owner.
    """
    owned = units.flatten().to(torch.int64)
    if others is None:
        free = torch.ones(size, dtype=torch.bool, device=owned.device)
        free[owned] = False
        others = free.nonzero().flatten()
    places = torch.cat([owned, others.to(owned)])
    if not torch.equal(places.sort().values, torch.arange(size, device=places.device)):
        raise BadInput(f"the units' {what} must each have one owner, and cover all {size} {what}")
    return places, owned.numel()
