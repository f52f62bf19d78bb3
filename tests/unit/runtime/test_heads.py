"""Routed projections against the dense projection, masked."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.spec import from_spec

linear = torch.nn.functional.linear


def layout(kind: str, units: int, size: int, extra: int, g: torch.Generator) -> Tensor:
    """(units, size) positions among units * size + extra."""
    total = units * size + extra
    if kind == "in order":
        return torch.arange(units * size).view(units, size)
    if kind == "interleaved":  # as per-head [q, k, v] projections store them
        return torch.arange(units * size).view(size, units).t() + extra
    return torch.randperm(total, generator=g)[: units * size].view(units, size)


SETTINGS = {
    "tokens": st.integers(0, 7),
    "units": st.sampled_from([1, 3, 6]),
    "kind": st.sampled_from(["in order", "interleaved", "random"]),
    "density": st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    "bias": st.booleans(),
    "dispatch": st.sampled_from(["auto", "grouped"]),
    "seed": st.integers(0, 10_000),
}


@settings(max_examples=60, deadline=None)
@given(**SETTINGS, extra=st.sampled_from([0, 5]))
def test_rows(
    tokens: int,
    units: int,
    kind: str,
    density: float,
    bias: bool,
    dispatch: str,
    seed: int,
    extra: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = layout(kind, units, 4, extra, g)
    out = units * 4 + extra
    weight = torch.randn(out, 8, generator=g, dtype=torch.float64)
    offset = torch.randn(out, generator=g, dtype=torch.float64) if bias else None
    module = RoutedRows.from_dense(weight, offset, rows)
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    x = torch.randn(2, tokens, 8, generator=g, dtype=torch.float64)
    select = (torch.rand(2, tokens, units, generator=g) < density).double()
    mask = torch.ones(2, tokens, out, dtype=torch.float64)
    mask[..., rows.flatten()] = select.repeat_interleave(4, -1)
    torch.testing.assert_close(module(x, select), linear(x, weight, offset) * mask)
    assert module.counter.rows == module.counter.units_live == int(select.sum())
    assert torch.equal(module.dense_weights()["weight"], weight)
    if offset is not None:
        assert torch.equal(module.dense_weights()["bias"], offset)
    twin = from_spec(module.spec())
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x, select), module(x, select))


@settings(max_examples=60, deadline=None)
@given(**SETTINGS, dropped=st.booleans(), weighted=st.booleans())
def test_columns(
    tokens: int,
    units: int,
    kind: str,
    density: float,
    bias: bool,
    dispatch: str,
    seed: int,
    dropped: bool,
    weighted: bool,
) -> None:
    g = torch.Generator().manual_seed(seed)
    columns = layout(kind, units, 4, 0, g)
    weight = torch.randn(8, units * 4, generator=g, dtype=torch.float64)
    offset = torch.randn(8, generator=g, dtype=torch.float64) if bias else None
    mean = torch.randn(units, 8, generator=g, dtype=torch.float64) if dropped else None
    module = RoutedColumns.from_dense(weight, offset, columns, mean)
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    z = torch.randn(2, tokens, units * 4, generator=g, dtype=torch.float64)
    select = (torch.rand(2, tokens, units, generator=g) < density).double()
    if weighted:
        select = select * torch.rand(2, tokens, units, generator=g, dtype=torch.float64)
    mask = torch.zeros_like(z)
    mask[..., columns.flatten()] = select.repeat_interleave(4, -1)
    want = linear(z * mask, weight, offset)
    if mean is not None:
        want = want + (select == 0).double() @ mean
    torch.testing.assert_close(module(z, select), want, atol=1e-12, rtol=1e-12)
    assert module.counter.rows == module.counter.units_live == int((select != 0).sum())
    assert torch.equal(module.dense_weights()["weight"], weight)
    twin = from_spec(module.spec())
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(z, select), module(z, select))


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_gradients(dispatch: str) -> None:
    select = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
    rows = torch.arange(6).view(3, 2)
    first = RoutedRows.from_dense(torch.randn(8, 5, dtype=torch.float64), torch.randn(8), rows)
    last = RoutedColumns.from_dense(torch.randn(4, 6, dtype=torch.float64), None, rows)
    for module in (first, last):
        module.double()
        module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert first.others is not None
    weights = [p.detach().requires_grad_() for p in (first.blocks, first.others, last.blocks)]

    def rows_of(x: Tensor, blocks: Tensor, others: Tensor) -> Tensor:
        swapped = {"blocks": blocks, "others": others}
        y: Tensor = torch.func.functional_call(first, swapped, (x, select))
        return y

    def columns_of(z: Tensor, blocks: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(last, {"blocks": blocks}, (z, select))
        return y

    assert torch.autograd.gradcheck(rows_of, (x, weights[0], weights[1]))
    assert torch.autograd.gradcheck(columns_of, (z, weights[2]))
    chosen = select.clone().requires_grad_()
    last(z, chosen).sum().backward()
    assert chosen.grad is not None
    assert (chosen.grad[select != 0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(dtype: torch.dtype) -> None:
    weight, z = torch.randn(64, 256).to(dtype), torch.randn(9, 256).to(dtype)
    bias = torch.randn(64).to(dtype)
    module = RoutedColumns.from_dense(weight, bias, torch.arange(256).view(32, 8))
    want = linear(z.double(), weight.double(), bias.double())
    for dispatch in ("auto", "grouped"):
        module.dispatch = "grouped" if dispatch == "grouped" else "auto"
        y = module(z, torch.ones(9, 32))
        assert y.dtype == dtype
        error = (y.double() - want).abs()
        assert (error <= torch.finfo(dtype).eps * want.abs() + 1e-4).all()


def test_copies_and_gradient_flags() -> None:
    weight = torch.randn(8, 6).requires_grad_()
    module = RoutedRows.from_dense(weight, None, torch.arange(6).view(3, 2))
    assert module.blocks.requires_grad
    assert not RoutedRows.from_dense(weight.detach(), None, torch.arange(6).view(3, 2)).params() < 1
    twin = copy.deepcopy(module).half()
    assert twin(torch.randn(2, 6).half(), torch.ones(2, 3)).dtype == torch.float16


def test_every_row_has_one_owner() -> None:
    weight = torch.randn(6, 6)
    with pytest.raises(BadInput, match="one owner"):
        RoutedRows.from_dense(weight, None, torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(BadInput, match="belong to no unit"):
        RoutedColumns.from_dense(weight, None, torch.tensor([[0, 1], [2, 3]]))


def test_cost() -> None:
    rows = RoutedRows.from_dense(torch.randn(8, 6), None, torch.arange(6).view(3, 2))
    assert rows.cost().flops == 2 * 8 * 6
    assert rows.cost(0.5).flops == 2 * (3 + 2) * 6
    columns = RoutedColumns.from_dense(torch.randn(8, 6), None, torch.arange(6).view(3, 2))
    assert columns.cost(0.5).bytes == 4 * 8 * 3
