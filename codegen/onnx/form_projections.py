"""Forms of routed projections: dead rows give zero, dead columns read zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.codegen.onnx.custom.product import product
from sparsify.codegen.onnx.forms import dead_to_zero, form, spread
from sparsify.runtime.gated import GatedLinear
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.hidden import HiddenColumns, HiddenFFN
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.latent import LatentProjection

linear = nn.functional.linear


@form(RoutedRows)
class RowsForm(RoutedRows):
    """x (..., in), select (..., H) -> (..., out)."""

    def prepare(self) -> None:
        self.register_buffer("back", inverse(self.places))

    back: Tensor | None

    def forward(self, x: Tensor, select: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        y = linear(x, self.blocks.flatten(0, 1), bias)
        live = spread(select != 0, self.blocks.shape[1])
        y = dead_to_zero(y, live.reshape(*x.shape[:-1], y.shape[-1]))
        if self.others is not None:
            y = torch.cat([y, linear(x, self.others, self.other_bias)], dim=-1)
        return y if self.back is None else y.index_select(-1, self.back)


class _Columns(RoutedColumns):
    """z (..., in), select (..., N) -> (..., out).

    Attributes:
        way: ``custom``: rows of dead units are not read; ``mask``. ways: both.
    """

    way = "mask"
    ways = ("mask", "custom")

    def columns(self, z: Tensor, select: Tensor) -> Tensor:
        units, width, _ = self.blocks.shape
        if self.places is not None:
            z = z.index_select(-1, self.places)
        select = select.reshape(*z.shape[:-1], units)
        wide = spread(select, width)
        y = product(dead_to_zero(z * wide, wide != 0), self.blocks.flatten(0, 1), self.way)
        if self.bias is not None:
            y = y + self.bias
        if self.dropped is not None:
            y = y + (select == 0).to(y.dtype) @ self.dropped
        return y


@form(RoutedColumns)
class ColumnsForm(_Columns):
    """See :class:`_Columns`."""

    def forward(self, z: Tensor, select: Tensor) -> Tensor:
        return self.columns(z, select)


@form(HiddenColumns)
class HiddenColumnsForm(_Columns, HiddenColumns):
    """With group fusion of the outputs, where there is one."""

    def forward(self, z: Tensor, select: Tensor) -> Tensor:
        y = self.columns(z, select)
        return y if self.mixing is None else fused(y, self.mixing)


@form(HiddenFFN)
class HiddenFfnForm(HiddenFFN):
    """Its three projections are forms of their own."""

    def prepare(self) -> None:
        self.register_buffer("back", inverse(self.down.places))

    back: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        select = self.router(x)
        sums = [self.up(x, select)]
        if self.gate is not None:
            sums.append(self.gate(x, select))
        hidden = self.activation(*sums).to(x.dtype)
        y: Tensor = self.down(hidden, select if self.both else torch.ones_like(select))
        if not self.both and self.mixing is None:
            return y
        if self.down.places is not None:
            y = y.index_select(-1, self.down.places)
        if self.both and self.still is not None:
            dead = (select == 0).to(y.dtype).unsqueeze(-1)
            y = y + (dead * self.still).flatten(-2)
        y = y if self.mixing is None else fused(y, self.mixing)
        return y if self.back is None else y.index_select(-1, self.back)


@form(RoutedLinear)
class LinearForm(RoutedLinear):
    """x (..., in) -> (..., out).

    Attributes:
        way: ``custom``: columns of dead inputs are not read; ``mask``. ways: both.
    """

    way = "mask"
    ways = ("mask", "custom")

    def forward(self, x: Tensor) -> Tensor:
        return _sums(self, x, self.way)


@form(GatedLinear)
class GatedForm(GatedLinear):
    """x (..., in), gates (..., out) -> (..., out); ``way`` as in :class:`LinearForm`."""

    way = "mask"
    ways = ("mask", "custom")

    def prepare(self) -> None:
        self.follow()

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        y = _sums(self, x, self.way)
        opened = None if gates is None else self.neurons(gates)
        return y if opened is None else torch.where(opened, y, self.usual.to(y.dtype))


def _sums(module: RoutedLinear, x: Tensor, way: str) -> Tensor:
    flat = module.select.centred(x)
    if module.select.all_live:
        y = flat @ module.columns
    else:
        flat = dead_to_zero(flat, module.select.live(module.select.scores(flat)))
        y = product(flat, module.columns, way)
    if module.offset is not None:
        y = y + module.offset
    return y if module.bias is None else y + module.bias


@form(LatentProjection)
class LatentForm(LatentProjection):
    """Only live ranks are in the file."""

    def prepare(self) -> None:
        live = self.rank.count
        self.down = nn.Parameter(self.down.detach()[:live], False)
        self.up = nn.Parameter(self.up.detach()[:, :live], False)
        self.register_buffer("back", inverse(self.places))

    back: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(linear(x, self.down), self.up)
        if self.others is not None:
            y = torch.cat([y, linear(x, self.others)], dim=-1)
        if self.back is not None:
            y = y.index_select(-1, self.back)
        return y if self.bias is None else y + self.bias


def inverse(places: Tensor | None) -> Tensor | None:
    """Where each place was: gathering by it scatters by ``places``."""
    return None if places is None else places.argsort()


def fused(y: Tensor, mixing: Tensor) -> Tensor:
    """:func:`sparsify.runtime.hidden.fuse` for any number of leading dimensions."""
    width, groups, _ = mixing.shape
    grouped = y.unflatten(-1, (groups, width)).transpose(-1, -2).unsqueeze(-2)  # (..., c, 1, N)
    mixed: Tensor = (grouped @ mixing).squeeze(-2)
    return mixed.transpose(-1, -2).flatten(-2)
