"""The router's kernel against eager, on numbers whose sums are exact: ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.codegen.triton.router import can_route, selection
from sparsify.runtime.router import Router


def case(seed: int) -> tuple[Router, Tensor]:
    """Small whole numbers: no rounding anywhere, so eager's selection is the only right one."""
    g = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).float()

    routed, shared, width = 1 + seed % 20, seed % 3, 1 + 7 * (seed % 9)
    order = torch.randperm(routed + shared, generator=g) if seed % 2 else None
    bias = whole(routed) if seed % 4 else None
    router = Router(whole(routed, width), bias, shared=shared, order=order)
    router.requires_grad_(False).eval()
    tokens = (1, 5, 16, 33, 70)[seed % 5]
    x = whole(tokens, width)
    return router, whole(width, tokens).t() if seed % 3 == 1 else x


@pytest.mark.parametrize("seed", range(1, 11))
def test_top_k(seed: int) -> None:
    router, x = case(seed)
    router.set_active((0.1, 0.5, 0.9)[seed % 3], warn=False)
    assert can_route(router)
    if not router.all_live:
        assert torch.equal(selection(router, x), router(x))


@pytest.mark.parametrize("seed", range(4))
def test_threshold(seed: int) -> None:
    router, x = case(seed)
    router.rule = "threshold"
    router.calibrate(x)
    router.set_active(0.6, warn=False)
    if not router.all_live:
        assert torch.equal(selection(router, x), router(x))


def test_all_tied_and_not_finite() -> None:
    router = Router(torch.zeros(6, 4), torch.tensor([0.0, -0.0, 0.0, 0.0, -0.0, 0.0]), active=0.5)
    router.requires_grad_(False)
    x = torch.ones(3, 4)
    assert torch.equal(selection(router.eval(), x), router(x))
    router.bias.copy_(torch.tensor([-torch.inf, torch.nan, 1.0, torch.inf, -1.0, 2.0]))
    assert torch.equal(selection(router, x), router(x))


def test_what_it_leaves_to_eager() -> None:
    router, _ = case(4)
    router.steer = torch.zeros(router.routed)
    assert not can_route(router)
    router, _ = case(4)
    router.train()
    assert not can_route(router)
    router.eval().keep = True
    assert not can_route(router)
    router = Router(torch.zeros(6, 4), rule="softmax-top-k").eval()
    assert not can_route(router)


def test_operator() -> None:
    router, x = case(7)
    args = (x, router.weight, router.bias, router.order, router.shared, 3, 0.0)
    found = torch.library.opcheck(
        torch.ops.sparsify.route.default, args, test_utils=("test_schema", "test_faketensor")
    )
    assert set(found.values()) == {"SUCCESS"}
