"""Slopes of what a model says, against the definition."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify import sensitivity
from sparsify.calibrate import collect
from sparsify.regions import LinearWeight, Projection
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.sensitivity import Sensitivity
from tests.contract.zoo_captures import captured


class Two(nn.Module):
    """x (B, T, 4) -> (B, T, words)."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.second = nn.Linear(6, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


def region_of(gm: fx.GraphModule) -> Projection:
    node = next(n for n in gm.graph.nodes if n.target == "first")
    weight = gm.get_submodule("first").weight
    assert isinstance(weight, Tensor)
    found = Projection("first", "x.py:1", linear=LinearWeight(weight, None, "first"), role="up")
    found.ports |= {"x": node.args[0], "y": node}
    return found


def model(words: int = 5) -> tuple[fx.GraphModule, Projection, Tensor]:
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Two(words))
    return gm, region_of(gm), torch.randn(64, 32, 4)


def fisher(gm: fx.GraphModule, x: Tensor) -> Tensor:
    """(4,): E over tokens and words of the squared slope of log p(word) by each input feature."""
    first, second = (gm.get_submodule(n).weight for n in ("first", "second"))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    p = gm(x).flatten(0, 1).softmax(-1).detach()  # (T, words)
    through = (second @ first).detach()  # (words, 4): a logit's slope
    slope = through - (p @ through)[:, None]  # (T, words, 4): of every log p
    return (p[..., None] * slope.square()).sum(1).mean(0)


def test_the_slope_of_a_drawn_word_is_the_fisher_information() -> None:
    gm, region, x = model()
    tool = Sensitivity(gm, [region])
    tool.add([x], None)
    found = tool.of(region)
    assert found is not None
    torch.testing.assert_close(found[0], fisher(gm, x), rtol=0.1, atol=0.01)
    assert all(p.grad is None for p in gm.parameters())  # no weight's gradient is computed


def test_it_says_how_far_the_prediction_moves() -> None:
    gm, region, x = model()
    expected = fisher(gm, x)
    first = gm.get_submodule("first").weight
    assert isinstance(first, Tensor)
    with torch.no_grad():
        before = gm(x).log_softmax(-1)
        for j, size in enumerate(expected):
            moved = x.clone()
            moved[..., j] += 0.02
            gap = (before.exp() * (before - gm(moved).log_softmax(-1))).sum(-1).mean()
            torch.testing.assert_close(gap, 0.5 * 0.02**2 * size, rtol=0.1, atol=1e-7)
    assert region.linear.weight is first


def test_masked_tokens_do_not_count_and_the_text_is_bounded() -> None:
    gm, region, x = model()
    tool = Sensitivity(gm, [region])
    tool.add([x], torch.zeros(64, 32, dtype=torch.int64))
    found = tool.of(region)
    assert found is not None
    assert not found.any()
    tool.seen = sensitivity.TOKENS
    tool.add([x], None)  # enough was seen
    assert tool.seen == sensitivity.TOKENS


def test_collect_hands_them_out_beside_rows() -> None:
    gm, region, x = model()
    wants = {"x": 100, "x.slope": 1}
    assert collect(gm, [(region, wants)], [([x], None)], predicts=True) == 64 * 32
    assert region.samples["x"].shape == (100, 4)
    assert region.samples["x.slope"].shape == (1, 4)


def test_models_that_predict_no_tokens_are_not_asked() -> None:
    gm, region, x = model()
    collect(gm, [(region, {"x": 100, "x.slope": 1})], [([x], None)], predicts=False)
    assert "x.slope" not in region.samples


def test_hidden_route_scores_by_slope() -> None:
    tokens = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(2))
    found = {}
    for score in ("slope", "wina"):
        text = f"hidden-route{{score={score}}}"
        model = sparsify.compile(captured("llama"), text, calibration=tokens.split(4))
        linear = model.get_submodule("graph.model.layers.0.mlp.down_proj.routed")
        assert isinstance(linear, RoutedLinear)
        found[score] = linear
    norms = found["wina"].columns.detach().norm(dim=1)
    torch.testing.assert_close(found["wina"].select.scale, norms)
    slopes = found["slope"].select.scale
    assert (slopes > 0).all()
    assert not torch.allclose(slopes / norms, (slopes / norms).mean(), rtol=0.01)
    assert isinstance(found["slope"].select, Magnitude)
