"""Routing by token and task."""

from __future__ import annotations

import pytest
import torch

from sparsify.errors import BadInput
from sparsify.runtime.spec import from_spec
from sparsify.runtime.task_router import TaskRouter, pooled, task
from tests.unit.runtime.examples import Dense


def made(task_weight: int | torch.Tensor = 3) -> TaskRouter:
    g = torch.Generator().manual_seed(0)
    return TaskRouter(torch.randn(4, 6, generator=g), task_weight=task_weight, active=0.5)


def test_it_starts_as_the_token_router() -> None:
    router, x = made(), torch.randn(2, 5, 6)
    plain = router(x)
    with task(router, torch.randn(2, 3)):
        assert torch.equal(router(x), plain)
    with task(router, torch.randn(2, 3)):
        router.scores(x).square().sum().backward()
    assert router.task_weight.grad is not None and router.task_weight.grad.abs().sum() > 0


def test_each_sequence_is_routed_by_its_task() -> None:
    weight = torch.tensor([[1e3, 0.0], [1e3, 0.0], [0.0, 1e3], [0.0, 1e3]])
    router, x = made(weight), torch.randn(2, 5, 6)
    with task(router, torch.eye(2)):
        select = router(x)
    assert select[0].tolist() == [[1, 1, 0, 0]] * 5
    assert select[1].tolist() == [[0, 0, 1, 1]] * 5
    with task(router, torch.tensor([1.0, 0.0])):  # one task for all
        assert (router(x)[..., :2] == 1).all()
    with pytest.raises(BadInput, match="tasks"), task(router, torch.eye(2)):
        router(torch.randn(3, 5, 6))
    with pytest.raises(BadInput, match="no task router"), task(Dense().routed(), torch.eye(2)):
        pass


def test_a_token_alone_is_routed_as_in_the_full_pass() -> None:
    router, x = made(torch.randn(4, 3)), torch.randn(2, 5, 6)
    with task(router, torch.randn(2, 3)):
        assert torch.equal(torch.cat([router(x[:, t : t + 1]) for t in range(5)], 1), router(x))


def test_spec_round_trip() -> None:
    router = made(torch.randn(4, 3))
    again = from_spec(router.spec())
    again.load_state_dict(router.state_dict())
    assert isinstance(again, TaskRouter)
    x = torch.randn(2, 5, 6)
    with task(router, torch.ones(3)), task(again, torch.ones(3)):
        assert torch.equal(again(x), router(x))


def test_pooled() -> None:
    x = torch.arange(8.0).view(1, 4, 2)
    assert pooled(x).tolist() == [[3, 4]]
    assert pooled(x, torch.tensor([[1, 0, 0, 1]])).tolist() == [[3, 4]]
    assert pooled(x, torch.tensor([[1, 1, 0, 0]])).tolist() == [[1, 2]]
