"""Routed projections: dead inputs are not read, at any number of tokens; the rest stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.errors import BadInput
from sparsify.passes._dead_inputs import usual
from sparsify.passes.hidden_route import HiddenRoute
from sparsify.regions import Projection
from sparsify.runtime.inputs import FEW, Magnitude, RoutedLinear
from sparsify.runtime.spec import from_spec
from tests.contract.zoo_captures import captured

IN, OUT = 16, 6


def made(
    rule: str = "top-k", centre: bool = False, dtype: torch.dtype = torch.float32
) -> RoutedLinear:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=g).to(dtype)
    middle = torch.randn(IN, generator=g).to(dtype) if centre else None
    select = Magnitude(weight.float().norm(dim=0), middle, rule=rule)  # type: ignore[arg-type]
    return RoutedLinear.from_dense(weight, torch.randn(OUT, generator=g).to(dtype), select)


def rows(tokens: int) -> Tensor:
    return torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1))


def reference(module: RoutedLinear, x: Tensor, k: int) -> Tensor:
    """Token by token: the k inputs with the largest |x_j - c_j| * norm_j, the rest at c."""
    centre = torch.zeros(IN) if module.select.centre is None else module.select.centre
    weight = module.columns.t()
    out = []
    for row in x:
        worth = (row - centre).abs() * weight.norm(dim=0)
        live = torch.zeros(IN, dtype=torch.bool)
        live[worth.topk(k).indices] = True
        assert module.bias is not None
        out.append(weight @ torch.where(live, row, centre) + module.bias)
    return torch.stack(out).detach()


@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 1, 40])
@pytest.mark.parametrize("centre", [False, True])
def test_against_a_loop(tokens: int, centre: bool) -> None:
    module, x = made(centre=centre), rows(tokens)
    module.select.set_active(0.25)
    with torch.no_grad():
        torch.testing.assert_close(module(x), reference(module, x, 4), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module(x[None])[0], module(x))
        module.select.set_active(1.0)
        torch.testing.assert_close(module(x), reference(module, x, IN), rtol=1e-5, atol=1e-5)


def test_dead_columns_are_not_read() -> None:
    module = made()
    module.select.set_active(0.25)
    for tokens in (1, 40):
        x = rows(tokens) * (torch.arange(IN) < 4)  # the same four inputs for every token
        with torch.no_grad():
            before = module(x)
            clean = module.columns.clone()
            module.columns[4:] = float("nan")
            torch.testing.assert_close(module(x), before)
            module.columns.copy_(clean)


def test_counters() -> None:
    module = made()
    module.select.set_active(0.5)
    with torch.no_grad():
        module(rows(3))
    assert module.counter.units_live == module.counter.rows == 3 * IN // 2
    assert module.counter.rows_dense == 3 * IN
    module.counter.reset()
    with torch.no_grad():
        module(rows(200))  # every column is live for some token: one dense product, said so
    assert module.counter.units_live == 200 * IN // 2
    assert module.counter.rows == 200 * IN


def test_no_tokens() -> None:
    module = made()
    module.select.set_active(0.5)
    assert module(torch.empty(2, 0, IN)).shape == (2, 0, OUT)


@pytest.mark.parametrize("active", [0.5, 1.0])
def test_gradients(active: float) -> None:
    module = made(centre=True, dtype=torch.float64)
    module.select.set_active(active)
    x = rows(5).double().requires_grad_()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in module.named_parameters()]
        out: Tensor = torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,)
        )
        return out

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


def test_half_types_and_spec() -> None:
    module = made(centre=True).to(torch.bfloat16)
    module.select.set_active(0.5)
    x = rows(4).bfloat16()
    with torch.no_grad():
        found = module(x)
    assert found.dtype == torch.bfloat16
    again = from_spec(module.spec())
    again.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), found)


def test_bad_scale() -> None:
    with pytest.raises(BadInput, match="one scale per input feature"):
        Magnitude(torch.ones(3, 3))


def test_calibrated_budget_and_roles() -> None:
    tokens = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(2))
    model = sparsify.compile(captured("llama"), "hidden-route", calibration=tokens.split(4))
    model.set_active(0.5)
    model.reset_counters()
    with torch.no_grad():
        model(input_ids=tokens)
    modules = {p: m for p, m in model.named_modules() if isinstance(m, RoutedLinear)}
    assert len(modules) == 14
    spent = sum(m.counter.units_live * m.columns.shape[1] for m in modules.values())
    total = sum(m.counter.units_total * m.columns.shape[1] for m in modules.values())
    assert abs(spent / total - 0.5) < 0.03  # a share of the multiply-adds, whatever the shapes
    budgets = {m.select.active for m in modules.values()}
    assert len(budgets) > 3  # it goes where it saves most


def test_feed_forward_alone() -> None:
    model = sparsify.compile(captured("gpt2"), "hidden-route{at=*.mlp.*}")
    (step,) = model.report.steps
    assert {r.region.split(".")[-2] for r in step.remarks if r.kind == "applied"} == {"mlp"}
    left = [r for r in step.remarks if r.kind == "left"]
    assert left
    assert all("not selected" in r.reason for r in left)


def test_threshold_needs_calibration() -> None:
    part = Projection(
        "p", "x.py:1", linear=sparsify.regions.LinearWeight(torch.ones(2, 2), None, "w"), role="up"
    )
    with pytest.raises(sparsify.Refused, match="calibration"):
        HiddenRoute(router="threshold").check(part)


def test_dead_features_count_as_dead_ones_do() -> None:
    """A feature that is mostly near 1 and sometimes far away: its centre is 1, not the mean."""
    g = torch.Generator().manual_seed(0)
    x = 1 + 0.1 * torch.randn(400, 3, generator=g)
    x[:40] += 20
    found = usual(x, torch.ones(3), 0.5)
    torch.testing.assert_close(found, torch.ones(3), atol=0.1, rtol=0)
    assert (x.mean(0) > 2).all()
    same = torch.zeros(4, 3)
    assert torch.equal(usual(same, torch.ones(3), 0.5), torch.zeros(3))
