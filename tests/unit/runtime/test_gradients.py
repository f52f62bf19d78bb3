"""Gradients of the routed operations against finite differences, in float64.

With respect to inputs, weights and the selection's weights, on selections that leave units dead for
some tokens, for all and for none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.router import Router
from sparsify.runtime.rule import RoutingRule
from sparsify.runtime.rules import SigmoidTopK, SoftmaxTopK
from sparsify.runtime.rules_cut import ExpertChoice, Null, Relu, TopP
from tests.unit.runtime.examples import Dense, score


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def selection(tokens: int, units: int) -> Tensor:
    """Weights of all kinds: the last unit dead for all, the first live for all."""
    select = draw(tokens, units, seed=9).abs() + 0.5
    select[:, 1:-1] *= (draw(tokens, units - 2, seed=8) > 0).double()
    select[:, -1] = 0
    return select


def check(module: nn.Module, *inputs: Tensor, select: Tensor | None = None, at: int = 1) -> None:
    """Gradcheck of every parameter and input; of the selection where it is live.

    A dead unit's weight has no gradient: nothing is computed that could give one.
    """
    names = [n for n, p in module.named_parameters() if p.numel() < 400]
    values = [dict(module.named_parameters())[n].detach().clone() for n in names]
    live = None if select is None else (select != 0)
    extra = () if select is None or live is None else (select[live],)

    def run(*tensors: Tensor) -> Tensor:
        weights = dict(zip(names, tensors, strict=False))
        rest: list[Any] = list(tensors[len(names) :])
        if select is not None and live is not None:
            full = torch.zeros_like(select).masked_scatter(live, rest.pop())
            rest.insert(at, full)
        result: Tensor = functional_call(module, weights, tuple(rest))
        return result

    wanted = [t.requires_grad_() for t in (*values, *(i.clone() for i in inputs), *extra)]
    assert torch.autograd.gradcheck(run, wanted, atol=1e-7)


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_rows(dispatch: Any) -> None:
    module = RoutedRows(draw(4, 2, 3), draw(2, 3, seed=1), draw(4, 2, seed=2), draw(2, seed=3))
    module.dispatch = dispatch
    module.double()
    # its weights are the mask's: rows of live units are computed, not scaled
    select = selection(5, 4)
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = draw(5, 3, seed=4).requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        y: Tensor = functional_call(module, dict(zip(names, weights, strict=True)), (x, select))
        return y

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_columns(dispatch: Any) -> None:
    module = RoutedColumns(draw(4, 2, 3), draw(3, seed=1), dropped=draw(4, 3, seed=2)).double()
    module.dispatch = dispatch
    check(module, draw(5, 8, seed=4), select=selection(5, 4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_attend(dispatch: Any, causal: bool) -> None:
    module = RoutedAttend(
        score(3), heads=4, kv_heads=2, head_dim=3, value_dim=2, causal=causal
    ).double()
    module.dispatch = dispatch
    select = selection(10, 4).view(2, 5, 4)
    q, k, v = draw(2, 4, 5, 3), draw(2, 2, 5, 3, seed=1), draw(2, 2, 5, 2, seed=2)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: module(q, k, v, select), inputs)


RULES: tuple[RoutingRule, ...] = (
    SoftmaxTopK(), SigmoidTopK(weights="paper"), TopP(weights="paper"), Relu(weights="paper"),
    Null(nulls=2, weights="paper"), ExpertChoice(weights="paper"),
)  # fmt: skip


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ffn_through_the_papers_weights(rule: RoutingRule, dispatch: Any) -> None:
    dense = Dense(width=4, hidden=8, experts=4, shared=0, dropped=True)
    router = Router(draw(4, 4, seed=5), draw(4, seed=6), rule=rule)
    router.calibrate(draw(200, 4, seed=7))
    module = RoutedFFN.from_dense(
        dense.up, dense.gate, dense.down, dense.up_bias, dense.gate_bias, dense.down_bias,
        order=dense.order, experts=4, activation=dense.activation, router=router,
        dropped=dense.dropped,
    ).double().eval()  # fmt: skip
    module.dispatch = dispatch
    router.set_active(0.5)
    live = router(draw(5, 4, seed=4)) != 0
    assert bool(live.any()) and not bool(live.all())
    check(module, draw(5, 4, seed=4))


def test_straight_through_is_the_sigmoid_s_slope() -> None:
    """Weights of one: no finite difference sees the slope; it is the documented one."""
    router = Router(draw(4, 3), active=0.5)
    x = draw(6, 3, seed=1)
    scores = router.scores(x).detach().requires_grad_()
    weight = router.select(x, scores).weights
    weight.sum().backward()
    s = torch.sigmoid(scores.detach())
    live = weight.detach() != 0
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, s * (1 - s) * live)
