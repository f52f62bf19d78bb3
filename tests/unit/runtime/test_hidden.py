"""Routed hidden sub-dimensions: their meaning, gradients, and that dead ones are not read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.hidden import HiddenColumns, HiddenFFN, HiddenRouter, fuse, unmixed
from sparsify.runtime.spec import from_spec
from tests.unit.runtime.examples import SILU

UNITS, BLOCK, NEURONS = 4, 2, 6
WIDTH = UNITS * BLOCK


def made(*, both: bool = False, seed: int = 0, power: float = 0.0) -> tuple[HiddenFFN, Any]:
    """A layer in float64 and its dense weights (up, gate, down), features permuted."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    up, gate, down = random(NEURONS, WIDTH), random(NEURONS, WIDTH), random(WIDTH, NEURONS)
    columns = torch.randperm(WIDTH, generator=g).view(UNITS, BLOCK)
    router = HiddenRouter(random(UNITS - 1, WIDTH), shared=1, power=power)
    module = HiddenFFN(
        router,
        RoutedColumns.from_dense(up, random(NEURONS), columns, random(UNITS, NEURONS)),
        RoutedColumns.from_dense(gate, None, columns),
        RoutedRows.from_dense(down, random(WIDTH), columns),
        activation=SILU,
        both=both,
        still=random(UNITS, BLOCK) if both else None,
        mixing=unmixed(UNITS, BLOCK, down) + 0.1 * random(BLOCK, UNITS, UNITS),
    )
    return module, (up, gate, down, columns)


def meaning(module: HiddenFFN, dense: Any, x: Tensor) -> Tensor:
    """The layer, token by token and without skipping, from the dense weights."""
    up, gate, down, columns = dense
    rows = []
    for token in x:
        live = module.router(token)
        read = torch.zeros(WIDTH, dtype=x.dtype)
        for unit, places in enumerate(columns):
            read[places] = live[unit] * token[places]
        a = up @ read + module.up.bias
        a = a + sum(module.up.dropped[u] for u in range(UNITS) if live[u] == 0)
        b = gate @ read
        y = down @ (torch.nn.functional.silu(b) * a) + module.down.dense_weights()["bias"]
        if module.both:
            for unit, places in enumerate(columns):
                if live[unit] == 0:
                    y[places] = module.still[unit]
        mixed = torch.zeros_like(y)
        for n, to in enumerate(columns):
            for j in range(BLOCK):
                mixed[to[j]] = sum(module.mixing[j, m, n] * y[columns[m][j]] for m in range(UNITS))
        rows.append(mixed)
    return torch.stack(rows)


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("active", [0.25, 0.5, 1.0])
@torch.no_grad()
def test_it_is_what_it_says(active: float, both: bool, dispatch: Any) -> None:
    module, dense = made(both=both, power=1.0)
    for part in module.modules():
        part.dispatch = dispatch  # type: ignore[assignment]
    module.router.set_active(active)
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), meaning(module, dense, x))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0, 1))
@torch.no_grad()
def test_scaling_keeps_the_total(seed: int, active: float, power: float) -> None:
    module, _ = made(seed=seed, power=power)
    module.router.set_active(active)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    select = module.router(x)
    live = (select != 0).sum(1)
    assert live.tolist() == [round(active * UNITS)] * 3
    expected = (UNITS / live.double()).pow(power)
    torch.testing.assert_close(select.amax(1), expected, rtol=1e-6, atol=0)
    assert torch.equal(module.router(-x), select)  # magnitudes decide


@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_dead_subdimensions_are_not_read(both: bool) -> None:
    """Their weights may be NaN: any product with them would show."""
    module, _ = made(both=both)
    module.router.set_active(0.5)
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    expected = module(x)
    dead = (module.router(x)[0] == 0).nonzero().flatten()
    assert len(dead) == 2
    assert module.gate is not None
    for part in (module.up, module.gate, *([module.down] if both else [])):
        part.blocks[dead] = float("nan")
        part.counter.reset()
    assert torch.equal(module(x), expected)
    assert (module.up.counter.rows, module.up.counter.rows_dense) == (2, 4)
    if both:
        assert (module.down.counter.rows, module.down.counter.rows_dense) == (2, 4)


@pytest.mark.parametrize("both", [False, True])
def test_gradients(both: bool) -> None:
    module, _ = made(both=both, power=0.5)
    module.router.set_active(0.5)
    x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        chosen = module.router(x)
    module.router.forward = lambda *_: chosen  # type: ignore[method-assign]
    weights = (module.up.blocks, module.down.blocks, module.mixing)

    def run(x: Tensor, *_: Tensor | None) -> Tensor:
        return module(x)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *weights))


def test_router_and_power_get_gradients() -> None:
    module, _ = made(both=True, power=0.5)
    module.router.set_active(0.5)
    module(torch.randn(5, WIDTH, dtype=torch.float64)).square().sum().backward()
    for parameter in (module.router.weight, module.router.power):
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0


@torch.no_grad()
def test_fusion_is_the_identity_at_first() -> None:
    y = torch.randn(5, WIDTH)
    assert torch.equal(fuse(y, unmixed(UNITS, BLOCK, y)), y)


@torch.no_grad()
def test_cost_follows_the_budget() -> None:
    module, _ = made(both=True)
    assert module.cost(0.5).flops < module.cost(1.0).flops
    half, whole = module.up.cost(0.5), module.up.cost(1.0)
    assert half.flops - whole.flops / 2 == 2 * UNITS * NEURONS  # the table of what stands in


@torch.no_grad()
def test_specs_round_trip() -> None:
    module, _ = made(both=True)
    module.router.set_active(0.5)
    columns = HiddenColumns(torch.randn(UNITS, BLOCK, 6))
    columns.mix(unmixed(3, 2, columns.blocks.detach()))
    for one in (module, columns):
        other = from_spec(json.loads(json.dumps(one.spec())))
        other.load_state_dict(one.state_dict())
        assert other.spec() == one.spec()
