"""ffn-moex: the router that predicts activation sparsity, and the pass that builds it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.errors import BadInput
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router
from sparsify.runtime.sparsity import SparsityRouter
from sparsify.runtime.spec import from_spec
from sparsify.runtime.unlearned import sparsity_scores
from tests.contract.zoo_captures import captured, tokens_of, worst_relative
from tests.unit.runtime.examples import GELU, Dense

R, M, D = 3, 5, 4  # routed experts, neurons of each, width


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x: Tensor, rows: Tensor, bias: Tensor) -> list[list[float]]:
    """Scores of tokens x (T, D) by the definition, number by number."""
    found = []
    for token in x.tolist():
        scores = []
        for expert, constants in zip(rows.tolist(), bias.tolist(), strict=True):
            columns = [*zip(*expert, strict=True), constants]
            centre = width = 0.0
            for value, column in zip([*token, 1.0], columns, strict=True):
                mean = sum(column) / M
                centre += value * mean
                width += value**2 * sum((w - mean) ** 2 for w in column) / M
            scores.append(-0.5 * (1 + math.erf(centre / math.sqrt(2 * width))))
        found.append(scores)
    return found


def test_scores_are_the_formula() -> None:
    x, rows, bias = draw(7, D), draw(R, M, D, seed=1), draw(R, M, seed=2)
    want = torch.tensor(by_hand(x, rows, bias), dtype=torch.float64)
    router = SparsityRouter.from_experts(rows, bias, shared=2)
    torch.testing.assert_close(router.scores(x), want)
    torch.testing.assert_close(sparsity_scores(x, rows, bias), want)
    other = SparsityRouter.from_experts(rows, bias, prefer="active")
    torch.testing.assert_close(other.scores(x), -want)
    router.set_active(3 / 5)  # two shared, one routed: the sparsest
    assert torch.equal(router(x)[:, 2:].argmax(-1), want.argmax(-1))
    assert (router(x).sum(-1) == 3).all()


def test_expected_share_of_active_neurons() -> None:
    """Against neurons drawn from the Gaussians that the router assumes (Monte Carlo)."""
    router = SparsityRouter(
        0.5 * draw(R, D),
        0.5 * draw(R, seed=1),
        spread=draw(R, D, seed=2).abs(),
        bias_spread=draw(R, seed=3).abs(),
    )
    count = 40_000
    x = draw(6, D, seed=4)
    rows = router.weight[:, None] + router.spread[:, None] * draw(R, count, D, seed=5)
    bias = router.bias[:, None] + router.bias_spread[:, None] * draw(R, count, seed=6)
    with torch.no_grad():
        active = (torch.einsum("td,rmd->trm", x, rows) + bias[None] > 0).double().mean(-1)
        error = (-router.scores(x) - active).abs().max()
    assert active.max() - active.min() > 0.5  # not all the same
    assert error < 4 * 0.5 / math.sqrt(count)  # four standard errors at most


def test_gradients() -> None:
    router = SparsityRouter.from_experts(draw(R, M, D), draw(R, M, seed=1))
    names = ("weight", "bias", "spread", "bias_spread")
    mine = [getattr(router, name).detach().requires_grad_() for name in names]

    def scores(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(router, dict(zip(names, given, strict=True)), (x, None))

    router.forward = lambda x, _: router.scores(x)  # type: ignore[assignment, misc]
    assert torch.autograd.gradcheck(scores, (draw(4, D, seed=7).requires_grad_(), *mine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neurons_that_are_alike_have_finite_gradients(dtype: torch.dtype) -> None:
    """One neuron an expert has no spread, and a zero token none either."""
    single = SparsityRouter.from_experts(draw(R, 1, D).to(dtype), shared=1)
    x = draw(5, D, seed=3).to(dtype)
    x[0] = 0
    x.requires_grad_()
    scores = single.scores(x)
    sign = sign_of(x, single.weight)
    torch.testing.assert_close(scores, -(1 + sign) / 2)
    several = SparsityRouter.from_experts(draw(R, M, D).to(dtype))
    (scores.sum() + several.scores(x).sum()).backward()
    for tensor in (x, *single.parameters(), *several.parameters()):
        assert tensor.grad is not None
        assert float(tensor.grad.float().abs().max()) < 1e3


def sign_of(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() @ weight.float().t()).sign()


def test_spec_round_trip_and_refit() -> None:
    rows, bias = draw(R, M, D), draw(R, M, seed=1)
    router = SparsityRouter.from_experts(rows, bias, shared=1, prefer="active")
    router.calibrate(draw(50, D, seed=2))
    router.rule = "threshold"
    router.set_active(0.6)
    again = from_spec(router.spec())
    assert isinstance(again, SparsityRouter)
    again.load_state_dict(router.state_dict())
    x = draw(9, D, seed=3)
    assert torch.equal(again(x), router(x))
    assert again.spec() == router.spec()
    router.refit(rows + 1, bias)
    torch.testing.assert_close(router.scores(x), -sparsity_scores(x, rows + 1, bias))


def test_bad_arguments() -> None:
    with pytest.raises(BadInput, match="prefer"):
        SparsityRouter(draw(R, D), prefer="dense")
    with pytest.raises(BadInput, match="spreads"):
        SparsityRouter(draw(R, D), spread=draw(R, D + 1))


def test_cost_counts_both_products() -> None:
    sparse, plain = SparsityRouter(draw(R, D), shared=1), Router(draw(R, D), shared=1)
    assert sparse.cost(1.0) == plain.cost(1.0)  # all live: nothing is scored
    assert sparse.cost(0.5).flops == 2 * plain.cost(0.5).flops == 4 * R * D
    assert sparse.cost(0.5).bytes == 2 * plain.cost(0.5).bytes


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_dead_experts_are_skipped(dispatch: str) -> None:
    dense = Dense(gated=False, experts=6, shared=1)
    rows = dense.up[dense.order].view(6, 4, -1)
    assert dense.up_bias is not None
    bias = dense.up_bias[dense.order].view(6, 4)
    dense.router = SparsityRouter.from_experts(rows[1:], bias[1:], shared=1)
    module = dense.routed()
    module.dispatch = "grouped" if dispatch == "grouped" else "auto"
    module.router.set_active(0.5)
    x = dense.x(10)
    y = module(x)
    assert module.counter.rows == module.counter.units_live == 30
    assert module.counter.rows_dense == 60
    keep = torch.cat([torch.ones(10, 1).bool(), live_by_hand(x, rows[1:], bias[1:], 2)], 1)
    hidden = GELU(torch.einsum("td,nmd->tnm", x, rows) + bias) * keep[:, :, None]
    want = hidden.flatten(1) @ dense.down.t()[dense.order] + dense.down_bias
    torch.testing.assert_close(y, want)


def live_by_hand(x: Tensor, rows: Tensor, bias: Tensor, keep: int) -> Tensor:
    """(T, R): which ``keep`` experts are live."""
    scores = sparsity_scores(x, rows, bias)
    return scores >= scores.sort(-1, descending=True).values[:, keep - 1 : keep]


@pytest.mark.parametrize(("name", "prefer"), [("llama", "sparse"), ("gpt2", "active")])
def test_calibrated(name: str, prefer: str, tmp_path: Path) -> None:
    cap = captured(name)
    batches = tokens_of(cap, name)
    model = sparsify.compile(
        cap, f"ffn-moex{{prefer={prefer}}}", calibration=batches, reproducer=None
    )
    assert worst_relative(model) <= 1e-5
    layers = [m for m in model.modules() if isinstance(m, RoutedFFN)]
    for layer in layers:  # the scores are those of the weights that the activation sees
        router = layer.router
        assert isinstance(router, SparsityRouter)
        seen, bias = (
            (layer.up, layer.up_bias) if layer.gate is None else (layer.gate, layer.gate_bias)
        )
        x = draw(5, layer.width).float()
        bias = None if bias is None else bias[router.shared :]
        want = sparsity_scores(x, seen[router.shared :], bias)
        torch.testing.assert_close(router.scores(x), want if prefer == "sparse" else -want)
    model.set_active(0.6)
    ids = torch.cat(batches)
    model.reset_counters()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    live = list(model.realised().values())
    assert abs(sum(live) / len(live) - 0.6) < 0.05
    model.save(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(sparsify.load(tmp_path / "out")(input_ids=ids).logits, whole)
