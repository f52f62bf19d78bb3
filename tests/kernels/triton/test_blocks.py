"""Routed rows and columns against the eager modules; tolerance: closeness.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.codegen.triton import columns as triton_columns
from sparsify.codegen.triton import lower
from sparsify.codegen.triton import rows as triton_rows
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from tests.kernels.triton.closeness import close


def rows_of(units: int, rows: int, inputs: int, others: int, bias: bool) -> RoutedRows:
    with torch.no_grad():
        places = torch.randperm(units * rows + others) if rows % 2 else None
        module = RoutedRows(
            torch.randn(units, rows, inputs) / inputs**0.5,
            torch.randn(others, inputs) if others else None,
            torch.randn(units, rows) if bias else None,
            torch.randn(others) if bias and others else None,
            places=places,
        )
    return module.eval().requires_grad_(False)


def columns_of(units: int, width: int, outputs: int, dropped: bool, bias: bool) -> RoutedColumns:
    with torch.no_grad():
        module = RoutedColumns(
            torch.randn(units, width, outputs) / (units * width) ** 0.5,
            torch.randn(outputs) if bias else None,
            dropped=torch.randn(units, outputs) if dropped else None,
            places=torch.randperm(units * width) if width % 2 else None,
        )
    return module.eval().requires_grad_(False)


def both(module: RoutedRows | RoutedColumns, x: torch.Tensor, select: torch.Tensor) -> None:
    module.kernel = None
    module.counter.reset()
    wanted = module(x, select)
    counted = (module.counter.units_live, module.counter.tokens, module.counter.rows)
    module.counter.reset()
    ran: list[bool] = []
    inner = lower.kernel_of(module)
    module.kernel = lambda m, *a: ran.append(True) or inner(m, *a)
    found = module(x, select)
    assert ran
    close(found, wanted, x.shape[-1] + module.units)
    assert (module.counter.units_live, module.counter.tokens, module.counter.rows) == counted


def case(seed: int, high: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    torch.manual_seed(seed)
    tokens, units = (1 if seed % 3 == 0 else draw(high)), draw(9)
    share = (0.0, 0.4, 0.7, 1.0)[seed % 4]
    live = torch.rand(tokens, units) < share
    bias, more = seed % 2 == 0, seed % 5 == 0
    inputs = draw(high)
    rows = rows_of(units, draw(80), inputs, draw(20) if more else 0, bias)
    both(rows, torch.randn(tokens, inputs), live.float())
    width = draw(40)
    columns = columns_of(units, width, draw(high), more or seed % 3 == 1, bias)
    both(columns, torch.randn(tokens, units * width), live * (torch.rand(tokens, units) + 0.5))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_matches_eager_on_random_shapes(seed):
    case(seed, 70)


@pytest.mark.slow
def test_matches_eager_on_500_shapes():
    for seed in range(500):
        case(20_000 + seed, 200)


@pytest.mark.parametrize("tokens", [1, 6])
def test_long_reductions_are_split(tokens):
    torch.manual_seed(3)
    live = (torch.rand(tokens, 40) < 0.5).float()
    both(columns_of(40, 48, 130, True, True), torch.randn(tokens, 1920), live)


def test_non_contiguous_inputs():
    torch.manual_seed(4)
    live = (torch.rand(8, 10) < 0.5).float().t()
    both(rows_of(8, 16, 24, 0, True), torch.randn(24, 10).t(), live)
    both(columns_of(8, 4, 24, False, True), torch.randn(20, 64)[::2, 5:37], live)


@pytest.mark.parametrize("tokens", [1, 9])
def test_half_precision(tokens):
    torch.manual_seed(5)
    live = (torch.rand(tokens, 6) < 0.5).half()
    both(rows_of(6, 16, 128, 0, True).half(), torch.randn(tokens, 128).half(), live)
    both(columns_of(6, 16, 64, True, True).half(), torch.randn(tokens, 96).half(), live)


def test_gradients_are_those_of_eager():
    torch.manual_seed(6)
    live = torch.where(torch.rand(7, 5) < 0.5, torch.rand(7, 5) + 0.5, 0.0)
    rows = rows_of(5, 9, 20, 0, True).requires_grad_(True)
    x = torch.randn(7, 20, requires_grad=True)
    g = torch.randn(7, 45)
    leaves = (x, rows.blocks, rows.bias)
    ours = triton_rows.routed_rows(x, live, rows.blocks, rows.bias, rows.places)
    pairs = [(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(rows(x, live), leaves, g))]
    columns = columns_of(5, 3, 20, True, True).requires_grad_(True)
    z, select = torch.randn(7, 15, requires_grad=True), live.clone().requires_grad_()
    leaves = (z, select, columns.blocks, columns.bias, columns.dropped)
    ours = triton_columns.routed_columns(
        z, select, columns.blocks, columns.bias, columns.dropped, columns.places
    )
    g = torch.randn(7, 20)
    wanted = torch.autograd.grad(columns(z, select), leaves, g)
    pairs.append((torch.autograd.grad(ours, leaves, g), wanted))
    for found, expected in pairs:
        for a, b in zip(found, expected, strict=True):
            close(a, b, 45)


def test_ops_are_what_their_fakes_say():
    live = (torch.rand(7, 5) < 0.5).float()
    rows, columns = rows_of(5, 4, 20, 0, True), columns_of(5, 4, 20, True, True)
    torch.library.opcheck(
        triton_rows.routed_rows, (torch.randn(7, 20), live, rows.blocks, rows.bias, None)
    )
    torch.library.opcheck(
        triton_columns.routed_columns,
        (torch.randn(7, 20), live, columns.blocks, columns.bias, columns.dropped, None),
    )
