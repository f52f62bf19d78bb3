"""Projections on CPU: when the dense product runs instead of the kernel, and that it agrees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.codegen.cpu import choice, tune
from sparsify.codegen.cpu.call import FEW, NEVER
from sparsify.codegen.cpu.choice import cuts_of, measure, table_of, told
from sparsify.codegen.cpu.lower import kernel_of, kernels_of
from sparsify.codegen.store import Store
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.inputs import RoutedLinear
from tests.kernels.cpu.test_linear import projection

pytestmark = pytest.mark.usefixtures("kernels")
ALWAYS = (math.inf, *(0.0,) * FEW)


def table(few: float, dense: float, whole: float) -> choice.Table:
    """Seconds: of the kernel with all live (half of it with a quarter live), of the others."""
    return {
        "few": dict.fromkeys(choice.TOKENS, (few / 2, few)),
        "dense": dict.fromkeys(choice.TOKENS, (dense, dense)),
        "whole": dict.fromkeys(choice.TOKENS, (whole, whole)),
    }


def test_dense_starts_where_it_is_faster() -> None:
    assert cuts_of(table(few=1.0, dense=1.0, whole=1.0)) == NEVER  # a tie is no reason
    assert cuts_of(table(few=4.0, dense=9.0, whole=2.0))[1:] == (1.0,) * FEW  # all live only
    (cut,) = set(cuts_of(table(few=4.4, dense=3.0, whole=3.0))[1:])
    assert 0.6 < cut < 0.7  # where 2.2 + (share - 0.25) / 0.75 * 2.2 is 3.3
    (cut,) = set(cuts_of(table(few=4.0, dense=1e-3, whole=1e-3))[1:])
    assert cut == pytest.approx(0.01)
    assert told(NEVER) == ""
    text = told((math.inf, *(0.9,) * FEW))
    assert text.endswith("1 from 90%, 2 from 90%, 4 from 90%, 8 from 90%")


def rows(**_: Any) -> RoutedRows:
    order = torch.randperm(26)
    return RoutedRows.from_dense(
        torch.randn(26, 10), torch.randn(26), order[:20].view(5, 4), order[20:]
    )


def columns(**_: Any) -> RoutedColumns:
    order = torch.randperm(20).view(5, 4)
    return RoutedColumns.from_dense(torch.randn(7, 20), torch.randn(7), order, torch.randn(5, 7))


@pytest.mark.parametrize("tokens", [1, 3, FEW])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("make", [rows, columns])
def test_the_dense_way_of_heads_agrees(make: Any, share: float, tokens: int) -> None:
    torch.manual_seed(tokens)
    module = make()
    kernel = kernel_of(module)
    assert not isinstance(kernel, type(None))
    width = module.blocks.shape[2] if make is rows else 20
    x = torch.randn(tokens, width)
    select = torch.rand(tokens, 5) * (torch.rand(tokens, 5) < share)
    if make is columns:  # dead units may hold anything
        spoiled = (select == 0).repeat_interleave(4, dim=1)
        x[:, module.places] = x[:, module.places].masked_fill(spoiled, math.nan)
    expected = module(x, select)
    counted = module.counter.units_live
    kernel.cuts, kernel.run = ALWAYS, None  # the C function is not called
    module.kernel = kernel
    module.counter.reset()
    torch.testing.assert_close(module(x, select), expected, rtol=1e-5, atol=1e-5)
    assert module.counter.units_live == counted
    assert module.counter.rows == tokens * 5  # what was multiplied, not what was asked for


@pytest.mark.parametrize("rule", ["threshold", "top-k"])
@pytest.mark.parametrize("active", [0.3, 1.0])
def test_the_dense_way_of_projections_agrees(rule: str, active: float) -> None:
    torch.manual_seed(0)
    module = projection(24, 10, rule=rule, active=active)
    x = torch.randn(2, 3, 24)
    expected = module(x)
    live = module.counter.units_live
    module.kernel = kernel = kernel_of(module)
    kernel.cuts, kernel.run = ALWAYS, None
    module.counter.reset()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert (module.counter.units_live, module.counter.rows) == (live, 6 * 24)


def test_the_kernel_runs_below_the_cut_and_dense_above() -> None:
    module = projection(24, 10, active=0.5)
    module.kernel = kernel = kernel_of(module)
    kernel.cuts = (math.inf, *(0.7,) * FEW)
    ran: list[Tensor] = []
    dense = kernel._dense
    kernel._dense = lambda *given: ran.append(given[1]) or dense(*given)
    x = torch.randn(1, 24)
    for active, times in ((0.5, 0), (0.75, 1), (1.0, 2), (0.25, 2)):
        module.select.set_active(active)
        module(x)
        assert len(ran) == times, active


def test_int8_is_never_replaced() -> None:
    module = projection(24, 10)
    kernel = kernel_of(module, int8=True)
    assert not kernel.dense
    (kernel,), _ = kernels_of([module], int8=True)
    assert kernel.cuts == NEVER


def test_measured_once_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = Store(tmp_path)  # made-up times are for nobody else
    monkeypatch.setattr(tune, "store", lambda: kept)
    modules = [projection(24, 10), projection(24, 10)]
    kernels = [kernel_of(m) for m in modules]
    before = [m.counter.tokens for m in modules]
    found = measure(modules, kernels)
    assert all(t > 0 for times in found.values() for pair in times.values() for t in pair)
    assert [m.counter.tokens for m in modules] == before
    asked: list[int] = []
    made = table(few=4.0, dense=1.0, whole=1.0)
    monkeypatch.setattr(choice, "measure", lambda *_: asked.append(1) or made)
    assert table_of(modules, kernels) == table_of(modules, kernels) == made
    assert asked == [1]
    kernels, text = kernels_of(modules)
    assert kernels[1].cuts == cuts_of(made)
    assert "dense where that is faster: tokens and live share 1 from" in text
    assert isinstance(modules[0], RoutedLinear)
