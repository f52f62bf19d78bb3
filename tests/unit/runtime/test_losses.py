"""Router losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.dial import routers
from sparsify.runtime.losses import balance, balance_loss, recording, z, z_loss
from tests.unit.runtime.examples import Dense


def test_balance_is_one_when_even_and_units_when_not() -> None:
    scores = torch.zeros(8, 4)
    assert torch.allclose(balance(scores, torch.ones(8, 4)), torch.tensor(1.0))
    scores[:, 0] = 50
    select = torch.zeros(8, 4)
    select[:, 0] = 1
    assert torch.allclose(balance(scores, select), torch.tensor(4.0))


def test_z_loss() -> None:
    assert torch.allclose(z(torch.zeros(3, 4)), torch.log(torch.tensor(4.0)) ** 2)


def test_losses_of_a_model_reach_its_routers() -> None:
    model = nn.Sequential(Dense(active=0.5).routed(), Dense(seed=1).routed())
    x = Dense().x(20)
    with recording(model):
        model(x)
        (balance_loss(model) + z_loss(model)).backward()
    for _, router in routers(model):
        assert router.weight.grad is not None
        assert router.weight.grad.abs().max() > 0
        assert not router.keep
        assert router.last is None
    with pytest.raises(BadInput, match="recording"):
        balance_loss(model)


def test_training_balances_the_load() -> None:
    torch.manual_seed(0)
    module = Dense(active=0.5, shared=0, dtype=torch.float32).routed()
    with torch.no_grad():
        module.router.weight.mul_(0.1)
        module.router.bias[:3] += 2
    x = Dense(dtype=torch.float32).x(256)
    optimiser = torch.optim.Adam(module.router.parameters(), lr=0.05)
    first = last = 0.0
    for step in range(80):
        with recording(module):
            module(x)
            loss = balance_loss(module)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first - 0.1
