"""Router losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.dial import routers
from sparsify.runtime.losses import (
    balance,
    balance_loss,
    choice,
    choice_loss,
    correct,
    moh_balance,
    moh_balance_loss,
    null_balance,
    null_balance_loss,
    recording,
    task_contrast,
    z,
    z_loss,
)
from sparsify.runtime.router import Router
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


def test_moh_balance_by_hand() -> None:
    scores = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # softmax 3/4 1/4, 1/2 1/2
    select = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # used by 1 and 1/2 of the tokens
    want = 2 * (1 * (0.75 + 0.5) / 2 + 0.5 * (0.25 + 0.5) / 2)
    torch.testing.assert_close(moh_balance(scores, select), torch.tensor(want))
    even = moh_balance(torch.zeros(6, 3), torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1]] * 2))
    torch.testing.assert_close(even, torch.tensor(2.0))  # k


def test_null_balance_takes_nulls_as_one_pool() -> None:
    scores, extra = torch.zeros(4, 2), torch.zeros(4, 2)
    select = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    uneven = torch.tensor([[True, False]] * 4)  # always the first null: no matter
    even = torch.tensor([[True, False], [False, True]] * 2)
    for null in (uneven, even):
        torch.testing.assert_close(null_balance(scores, extra, select, null), torch.tensor(1.0))
    scores = torch.tensor([[math.log(2), 0.0]]).expand(4, 2)  # softmax 2/5 1/5 1/5 1/5
    want = 4 * (0.4 * 0.5 + 0.2 * 0 + 0.2 * 0.25 + 0.2 * 0.25)
    found = null_balance(scores, extra, torch.tensor([[1.0, 0]] * 4), uneven)
    torch.testing.assert_close(found, torch.tensor(want))


def test_choice_by_hand() -> None:
    found = choice(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor((math.log(2) + math.log(4)) / 2))


def test_task_contrast_by_hand() -> None:
    query, key = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    found = task_contrast(query, key, weight)
    want = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    torch.testing.assert_close(found, torch.tensor(want))
    found.backward()
    assert key.grad is None  # the momentum copy learns nothing
    assert weight.grad is not None
    with pytest.raises(BadInput, match="alike"):
        task_contrast(torch.eye(2), torch.eye(3), torch.eye(2))


def _router(rule: str, **options: object) -> Router:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=g)
    return Router(weight, torch.tensor([2.0, 2, 0, 0, 0, 0]), rule=rule, **options)  # type: ignore[arg-type]


def test_corrections_balance_the_load_without_gradients() -> None:
    router = _router("sigmoid-top-k", active=0.5)
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))

    def spread() -> float:
        return float((router(x) != 0).float().mean(0).std())

    before = spread()
    for step in range(60):
        with recording(router):
            router(x)
            correct(router, rate=0.02)
        if step == 0:
            load = (_router("sigmoid-top-k", active=0.5)(x) != 0).float().sum(0)
            assert router.correction is not None
            torch.testing.assert_close(router.correction, 0.02 * (load.mean() - load).sign())
    assert spread() < before / 3
    assert router.correction is not None and not router.correction.requires_grad


def test_losses_of_single_rules_reach_their_routers() -> None:
    x = torch.randn(2, 30, 8)
    null, chooser, heads = _router("null"), _router("expert-choice"), _router("moh", shared=1)
    model = nn.ModuleList([null, chooser, heads]).train()
    for router in (null, chooser):
        router.calibrate(x)
    for router in model:
        router.set_active(0.5)
    with recording(model):
        for router in model:
            router(x)
        (null_balance_loss(null) + choice_loss(model) + moh_balance_loss(heads)).backward()
        with pytest.raises(BadInput, match="no null router"):
            null_balance_loss(heads)
    for router in model:
        assert router.weight.grad is not None and float(router.weight.grad.abs().sum()) > 0
    assert null.extra is not None and null.extra.grad is not None
    assert not null.last_aux


def test_choice_loss_teaches_decoding() -> None:
    torch.manual_seed(0)
    router = Router(
        torch.zeros(3, 8), rule="expert-choice", rule_options={"decode": "zero"}
    ).train()
    router.set_active(1 / 3)
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(4, 60, 8)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(80):
        with recording(router):
            router(x)
            loss = choice_loss(router)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    chosen = router(x) != 0
    router.eval()
    agree = ((router(x) != 0) == chosen).float().mean()
    assert float(agree) > 0.95
