"""Losses on how many units are live, against hand values."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.errors import BadInput
from sparsify.runtime.losses import recording
from sparsify.runtime.router import Router
from sparsify.runtime.sparsity_losses import (
    Adaptive,
    activation,
    activation_loss,
    l1,
    l1_loss,
    sparsity,
    target_sparsity,
)


def test_l1_by_hand() -> None:
    gates = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    torch.testing.assert_close(l1(gates, 1, balanced=False), torch.tensor(3.0))
    # loads R / (k T) * count = 3/2 * (2, 0, 1): the first unit's gates weigh 3, the third's 1.5
    torch.testing.assert_close(l1(gates, 1), torch.tensor((3 * 1 + 1.5 * 2 + 3 * 3) / 2))


def test_adaptation_by_hand() -> None:
    remoe = Adaptive(value=1.0, rate=1.2)
    assert remoe.update(0.3, 0.5) == pytest.approx(1.2)  # too dense
    assert remoe.update(0.7, 0.5) == pytest.approx(1.0)
    assert remoe.update(0.5, 0.5) == pytest.approx(1.0)
    pvchat = Adaptive(value=1.0, rate=2.0, how="distance")
    assert pvchat.update(0.3, 0.5) == pytest.approx(math.exp(0.4))
    assert pvchat.update(0.6, 0.5) == pytest.approx(math.exp(0.2))  # closer: a smaller step
    with pytest.raises(BadInput, match="adaptation"):
        Adaptive(how="never")


def test_activation_by_hand() -> None:
    scores = torch.tensor([[1.0, -1.0, -1.0, -1.0]], requires_grad=True)  # sparsity 3/4
    found = activation(scores, 0.5)
    torch.testing.assert_close(found, torch.tensor(math.exp(0.5) - 1))
    found.backward()
    assert scores.grad is not None and (scores.grad <= 0).all() and scores.grad.abs().sum() > 0
    assert activation(scores, 0.9).item() == 0  # dense enough


@pytest.mark.parametrize("how", ["sign", "distance"])
def test_training_reaches_the_target(how: str) -> None:
    torch.manual_seed(0)
    router = Router(torch.randn(8, 6) * 0.3, torch.ones(8), rule="relu").train()
    router.set_active(0.5)
    x = torch.randn(256, 6)
    adaptive = Adaptive(value=0.01, rate=1.05 if how == "sign" else 0.2, how=how)
    optimiser = torch.optim.SGD(router.parameters(), lr=0.1)
    seen = []
    for _ in range(300):
        with recording(router):
            router(x)
            wish = (router.scores(x).relu() - 1).square().mean()  # the task wants open gates
            loss = wish + adaptive.value * l1_loss(router)
            if how == "distance":  # PVChat's pair
                loss = loss + activation_loss(router)
            adaptive.update(sparsity(router), target_sparsity(router))
            seen.append(sparsity(router))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert target_sparsity_of(router) == 0.5
    assert seen[0] < 0.1
    assert abs(sum(seen[-20:]) / 20 - 0.5) < 0.1


def target_sparsity_of(router: Router) -> float:
    with recording(router):
        router(torch.zeros(1, 6))
        return target_sparsity(router)


def test_other_routers_have_no_zero_point() -> None:
    router = Router(torch.randn(4, 6), active=0.5)
    with recording(router):
        router(torch.randn(3, 6))
        with pytest.raises(BadInput, match="no relu router"):
            l1_loss(router)
