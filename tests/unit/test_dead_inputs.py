"""What stands in for dead inputs, and what is lost by them together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

import sparsify
from sparsify.passes._dead_inputs import cut_losses, usual
from sparsify.passes.hidden_route import DEAD
from sparsify.runtime.budget import ERROR_POINTS
from sparsify.runtime.inputs import Magnitude
from tests.contract.zoo_captures import captured, tokens_of


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lost(x: Tensor, centre: Tensor, scale: Tensor, dead: float) -> float:
    """Squared error of the ``dead`` share of inputs that are nearest to their stand-ins."""
    away = ((x - centre).abs() * scale).flatten()
    return float(away.sort().values[: round(dead * len(away))].square().sum())


def test_where_values_pile_up() -> None:
    """GELU's neurons: the mean lies above nearly all of them."""
    x = gelu(draw(600, 40) - 1.0)
    scale = torch.ones(40)
    found = usual(x, scale, DEAD)
    assert (found < x.mean(0)).all()
    for dead in (0.5, DEAD, 0.8):
        assert lost(x, found, scale, dead) < 0.4 * lost(x, x.mean(0), scale, dead)


def test_symmetric_values_keep_their_mean() -> None:
    x = draw(2000, 16) * torch.linspace(0.5, 2, 16) + torch.linspace(-3, 3, 16)
    found = usual(x, torch.ones(16), DEAD)
    assert (found - x.mean(0)).abs().max() < 0.25
    assert (usual(x.bfloat16(), torch.ones(16), DEAD) - found).abs().max() < 0.05


def test_few_values() -> None:
    x = draw(3, 5)
    assert torch.equal(usual(x, torch.ones(5), DEAD), x.median(0).values)


def test_losses_of_a_cut_are_measured() -> None:
    x, weight = draw(200, 24), draw(7, 24, seed=1)
    centre, stream = x.mean(0), draw(200, 1, seed=2).square() + 0.1
    scores = (x - centre).abs() * weight.norm(dim=0)
    table = cut_losses(lambda rows: linear(rows, weight), x, centre, scores, stream)
    assert table.shape == (ERROR_POINTS,) and float(table[0]) == 0
    assert (table[1:] >= table[:-1]).all()
    at = (ERROR_POINTS - 1) // 2
    threshold = scores.flatten().sort().values[round((scores.numel() - 1) / 2)]
    cut = torch.where(scores > threshold, x, centre)
    want = (linear(cut - x, weight).square().sum(1, keepdim=True) / stream).mean()
    torch.testing.assert_close(table[at], want)
    plain = cut_losses(lambda rows: linear(rows, weight), x, centre, scores)
    everything = linear(x - centre, weight).square().sum(1).mean()
    torch.testing.assert_close(plain[-1], everything)


@pytest.mark.parametrize(("zoo", "measured"), [("gpt2", True), ("llama", False)])
def test_layers_without_a_gate_are_measured(
    zoo: str, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.passes import _dead_inputs

    seen = []
    usual_losses = _dead_inputs.cut_losses

    def watched(*args: Tensor) -> Tensor:
        seen.append(usual_losses(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(_dead_inputs, "cut_losses", watched)
    cap = captured(zoo)
    model = sparsify.compile(
        cap,
        "hidden-route{score=wina}",
        calibration=tokens_of(cap, zoo),
        reproducer=None,
        verify="end",
    )
    routers = {p: m for p, m in model.named_modules() if isinstance(m, Magnitude)}
    assert bool(seen) == measured, [p for p, r in routers.items() if r.errors is None]
    if measured:
        tables = [router.errors for router in routers.values()]
        assert all(any(torch.equal(t, s) for t in tables if t is not None) for s in seen)
