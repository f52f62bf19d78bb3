"""Up projections that leave out neurons of small gates: what they compute, count and cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify import api
from sparsify.counted import Tally
from sparsify.passes._gates import both
from sparsify.runtime.gated import Factor, GatedLinear
from sparsify.runtime.inputs import FEW, RoutedLinear
from sparsify.runtime.spec import from_spec
from tests.contract.zoo_captures import captured

IN, OUT, TOKENS = 16, 12, 200


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made() -> GatedLinear:
    weight = draw(OUT, IN)
    select = Factor(weight.norm(dim=0), draw(IN, seed=1), rule="threshold")
    select.calibrate(select.centred(draw(TOKENS, IN, seed=2)))
    neurons = Factor(draw(OUT, seed=3).abs(), rule="threshold")
    neurons.calibrate(draw(TOKENS, OUT, seed=4))
    usual = draw(OUT, seed=5)
    return GatedLinear.from_gated(weight, draw(OUT, seed=6), select, neurons, usual)


@pytest.mark.parametrize("tokens", [1, FEW, 40])
@pytest.mark.parametrize("active", [0.25, 0.5])
def test_against_a_loop(tokens: int, active: float) -> None:
    module, x, gates = made(), draw(tokens, IN, seed=7), draw(tokens, OUT, seed=8)
    module.select.set_active(active)
    with torch.no_grad():
        found = module(x, gates)
    centre, pairs = module.select.centre, 0
    assert centre is not None and module.bias is not None
    assert module.neurons.active == active
    for row, gate, y in zip(x, gates, found, strict=True):
        live = (row - centre).abs() * module.select.scale > module.select.threshold
        opened = gate.abs() * module.neurons.scale > module.neurons.threshold
        whole = torch.where(live, row, centre) @ module.columns + module.bias
        torch.testing.assert_close(y, torch.where(opened, whole, module.usual))
        pairs += int(live.sum()) * int(opened.sum())
    assert module.counter.units_live == pytest.approx(pairs / OUT, abs=0.5)
    assert module.counter.units_total == tokens * IN


def test_shares_multiply_to_the_budget() -> None:
    module = made()
    module.select.set_active(0.49)
    with torch.no_grad():
        module(draw(TOKENS, IN, seed=2), draw(TOKENS, OUT, seed=4))
    assert module.select.budget / IN == pytest.approx(0.7)
    assert module.counter.live_fraction == pytest.approx(0.49, abs=0.03)


def test_dense_limit_and_spec() -> None:
    module, x, gates = made(), draw(5, IN, seed=7), draw(5, OUT, seed=8)
    with torch.no_grad():
        dense = x @ module.columns + module.bias
        torch.testing.assert_close(module(x, gates), dense, rtol=1e-5, atol=1e-5)
        module.select.set_active(0.5)
        found = module(x, gates)
        again = from_spec(module.spec())
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(x, gates), found)


def test_table_of_both() -> None:
    one, two = torch.linspace(0, 3, 65), torch.linspace(0, 1, 65).square()
    found = both(one, two)
    assert found[0] == 0
    assert float(found[-1]) == pytest.approx(4.0)
    dead = 1 - 0.25**0.5  # at a quarter of the operations
    assert float(found[48]) == pytest.approx(3 * dead + dead**2, abs=1e-3)


def test_pass() -> None:
    tokens = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(2))
    model = sparsify.compile(captured("llama"), "hidden-route{gated=true}",
                             calibration=tokens.split(4))  # fmt: skip
    gated = [m for m in model.modules() if isinstance(m, GatedLinear)]
    assert len(gated) == 2
    assert len([m for m in model.modules() if isinstance(m, RoutedLinear)]) == 14
    tally = Tally(model)
    model.set_active(0.5)
    tally.reset()
    with torch.no_grad():
        sparse = model(input_ids=tokens).logits
    tally.add()
    assert tally.flops == pytest.approx(0.5, abs=0.03)
    assert {m.neurons.active for m in gated} == {m.select.active for m in gated}
    model.set_active(1.0)
    with torch.no_grad():
        dense = model(input_ids=tokens).logits
    assert (sparse - dense).abs().max() > 0
    assert all(m.neurons.all_live for m in gated)


def test_evaluated_beside_baselines_and_saved(tmp_path: object) -> None:
    tokens = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(2))
    model = sparsify.compile(captured("llama"), "hidden-route{gated=true at=*.mlp.*}",
                             calibration=tokens.split(4))  # fmt: skip
    from sparsify.evaluate import quality

    found = quality(model, list(tokens.split(4)), text="t", active=[0.5],
                    calibration=list(tokens.split(4)),
                    run=lambda ids: model(input_ids=ids))  # fmt: skip
    assert [row.model for row in found.rows] == ["dense", "routed", "static pruning", "TEAL"]
    routed, teal = found.rows[1], found.rows[3]
    assert teal.flops == pytest.approx(routed.flops, abs=0.03)
    model.save(tmp_path)
    again = api.load(str(tmp_path))
    for one in (model, again):
        one.set_active(0.5)
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
