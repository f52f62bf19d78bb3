"""Steering: units turned up or down, for a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.errors import BadInput
from sparsify.runtime.router import Router
from sparsify.runtime.steering import steering
from tests.unit.runtime.examples import Dense


def test_a_unit_turned_up_is_used_by_every_token_and_one_turned_down_by_none() -> None:
    model = nn.Sequential(Dense(active=0.5).routed(), Dense(seed=1, active=0.5).routed())
    x = Dense().x(40)
    first = model[0]
    before, plain = model(x), first.router(x)
    with steering(model, {2: 1e3, 4: -1e3}, at="0") as paths:
        assert paths == ["0.router"]
        select = first.router(x)
        assert (select[:, 2] == 1).all()
        assert (select[:, 4] == 0).all()
        assert ((select != 0).sum(1) == (plain != 0).sum(1)).all()  # the budget stays
        assert not torch.equal(model(x), before)
        assert "steer" not in " ".join(model.state_dict())
    assert torch.equal(model(x), before)


def test_units_are_numbered_as_the_routed_module_does() -> None:
    order = torch.tensor([3, 0, 2, 1])
    router = Router(torch.zeros(3, 4), shared=1, active=0.5, order=order)
    with steering(router, {1: 1.0}):
        assert router(torch.randn(5, 4)).tolist() == [[0, 1, 0, 1]] * 5
    with pytest.raises(BadInput, match="shared"), steering(router, {3: 1.0}):
        pass
    with pytest.raises(BadInput, match="no unit 4"), steering(router, {4: 1.0}):
        pass
    with pytest.raises(BadInput, match="no router"), steering(nn.Linear(2, 2), {0: 1.0}):
        pass


def test_amounts_in_deviations() -> None:
    router = Router(torch.randn(4, 6), active=0.5)
    x = torch.randn(3, 6)
    plain = router.scores(x)
    with steering(router, {1: 2.0}, relative=True):
        steered = router.scores(x)
    moved = (steered - plain)[:, 1]
    torch.testing.assert_close(moved, 2 * plain.std(-1))
    assert torch.equal(router.scores(x), plain)


def test_steering_ends_with_an_error_in_the_block() -> None:
    router = Router(torch.randn(4, 6), active=0.5)
    with pytest.raises(ZeroDivisionError), steering(router, {0: 1.0}):
        _ = 1 / 0
    assert router.steer is None
