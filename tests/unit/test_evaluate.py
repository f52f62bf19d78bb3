"""Scores against plain formulas, static pruning against a loop; nothing stays changed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify import evaluate
from sparsify import static_pruning as static
from sparsify import static_units as units
from sparsify.errors import BadInput
from sparsify.runtime import metrics
from sparsify.runtime.dial import set_active
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router

VOCAB, D, F, H, C = 23, 8, 12, 4, 3
GATED = Program(
    ("up", "gate"),
    (Step("a", "aten.silu.default", (Ref("gate"),), {}),
     Step("h", "aten.mul.Tensor", (Ref("a"), Ref("up")), {})),
    "h",
)  # fmt: skip


class Language(nn.Module):
    """Embedding, heads, feed-forward layer, vocabulary: a routed language model in ten lines."""

    def __init__(self, order: bool = True) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        self.embed = nn.Embedding.from_pretrained(draw(VOCAB, D))
        self.mix = nn.Parameter(draw(H * C, D))
        self.head_router = Router(draw(H - 1, D), shared=1)
        columns = torch.randperm(H * C, generator=g).view(H, C)
        self.heads = RoutedColumns.from_dense(
            draw(D, H * C),
            draw(D),
            columns if order else torch.arange(H * C).view(H, C),
            draw(H, D),
        )
        self.ffn = RoutedFFN.from_dense(
            draw(F, D), draw(F, D), draw(D, F), draw(F), draw(F), draw(D),
            order=torch.randperm(F, generator=g), experts=4, activation=GATED,
            router=Router(draw(3, D), shared=1), dropped=draw(4, D),
        )  # fmt: skip
        self.out = nn.Linear(D, VOCAB)
        self.out.weight.data = draw(VOCAB, D) / D**0.5
        self.out.bias.data = draw(VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.heads(torch.tanh(x @ self.mix.t()), self.head_router(x))
        x = x + self.ffn(x)
        logits: Tensor = self.out(x)
        return logits


def ids(rows: int = 6, tokens: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------- scores


@given(st.integers(1, 3), st.integers(2, 150), st.integers(0, 5))
def test_scores_are_the_formulas(batch: int, tokens: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mine, dense = torch.randn(2, batch, tokens, 7, generator=g)
    target = torch.randint(0, 7, (batch, tokens), generator=g)
    score = evaluate.Score()
    score.add(mine, dense.log_softmax(-1), target)
    p, q = dense[:, :-1].softmax(-1), mine[:, :-1].softmax(-1)
    nll = nn.functional.cross_entropy(mine[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    assert score.tokens == batch * (tokens - 1)
    assert score.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert score.mean_kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert score.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_a_model_compared_with_itself() -> None:
    model = Language()
    scores = evaluate.compare(model, {"same": model}, [ids()])
    assert scores["same"].mean_kl == 0
    assert scores["same"].top1 == 1
    assert scores["same"].perplexity == scores["dense"].perplexity
    assert evaluate.perplexity(model, [ids()]) == scores["dense"].perplexity


def test_batching_does_not_matter() -> None:
    model = Language()
    whole = evaluate.perplexity(model, [ids()])
    assert evaluate.perplexity(model, ids().split(2)) == pytest.approx(whole)


def test_outputs_of_every_kind() -> None:
    logits = torch.randn(1, 3, 5)
    for output in (logits, (logits,), {"logits": logits}, SimpleNamespace(logits=logits)):
        assert evaluate.logits_of(output) is logits
    bads: tuple[Any, ...] = (None, (), {}, [[1.0]], SimpleNamespace(logits=None))
    for bad in bads:
        with pytest.raises(BadInput, match="no logits"):
            evaluate.logits_of(bad)


def test_too_short() -> None:
    with pytest.raises(BadInput, match="too short"):
        evaluate.compare(Language(), {}, [])


def test_hopeless_models_have_infinite_perplexity() -> None:
    assert evaluate.Score(tokens=1, nll=1e6).perplexity == math.inf


# ---------------------------------------------------------------------------- static pruning


@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 30)), min_size=1, max_size=12))
def test_whole_units_meet_the_budget(layers: list[tuple[float, int]]) -> None:
    fractions, sizes = [a for a, _ in layers], [n for _, n in layers]
    found = static.counts(fractions, sizes)
    assert all(1 <= k <= n for k, n in zip(found, sizes, strict=True))
    clamped = any(a * n < 1 for a, n in layers)
    wanted = sum(a * n for a, n in layers)
    assert clamped or abs(sum(found) - wanted) <= 1


@pytest.mark.parametrize("kind", ["neurons", "inputs"])
@pytest.mark.parametrize("compensate", [True, False])
def test_units_are_ranked_by_what_they_add(kind: str, compensate: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, D, generator=g) + 0.3
    if kind == "neurons":
        found: units.Units = units.Neurons(Language().ffn)
        dense = units.DenseFFN.of_routed(Language().ffn)
        values, rows = dense.hidden(x), dense.down
    else:
        weight = torch.randn(F, D, generator=g)
        routed = RoutedLinear.from_dense(weight, None, Magnitude(weight.norm(dim=0)))
        found, values, rows = units.Inputs(routed), x, weight.t()
    moments = units.Moments()
    with found.watched(moments):
        found.module(x[:50])
        found.module(x[50:])  # streamed
    live, extra = found.ranking(moments).choose(5, compensate=compensate)
    assert int(live.sum()) == 5
    parts = values.unsqueeze(2) * rows  # (n, N, D)
    if compensate:
        mean = parts.mean(0)
        parts = parts - mean
        torch.testing.assert_close(extra, mean[~live].sum(0), rtol=1e-4, atol=1e-4)
    worth = parts.square().sum(2).mean(0)
    assert set(worth.topk(5).indices.tolist()) == set(live.nonzero().flatten().tolist())


def test_projections_are_pruned_by_the_same_inputs_for_every_token() -> None:
    g = torch.Generator().manual_seed(4)
    weight, bias, x = (torch.randn(shape, generator=g) for shape in ((F, D), (F,), (30, D)))
    centre = torch.randn(D, generator=g)
    routed = RoutedLinear.from_dense(weight, bias, Magnitude(weight.norm(dim=0), centre))
    live, extra = torch.arange(D) < 3, torch.randn(F, generator=g)
    with units.Inputs(routed).pruned(live, extra, None):
        found = routed(x)
    expected = x[:, live] @ weight[:, live].t() + bias + extra
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(routed(x), x @ weight.t() + bias)


@pytest.mark.parametrize("order", [True, False])
def test_routed_models_are_pruned_by_the_same_units_for_every_token(order: bool) -> None:
    model = Language(order)
    model.head_router.set_active(0.5)
    model.ffn.router.set_active(0.75)
    at_budget = model(ids())
    rankings = static.rank(model, model, [ids()])
    assert set(rankings) == {"heads", "ffn"}
    assert rankings["ffn"].units == F
    with static.all_live(model):
        dense = model(ids())
        x = model.embed(ids())
        z = torch.tanh(x @ model.mix.t())
        weights = model.heads.dense_weights()
    assert torch.equal(model(ids()), at_budget)

    for compensate in (False, True):
        chosen = static.plan(rankings, {"heads": 0.5, "ffn": 0.5}, compensate=compensate, note="")
        assert chosen.active == 0.5
        with static.pruned(model, chosen):
            found = model(ids())
        # the oracle: head by head, neuron by neuron
        live, extra = chosen.layers["heads"]
        places = model.heads.places
        columns = (torch.arange(H * C) if places is None else places).view(H, C)
        attended = weights["bias"].clone().expand_as(x)
        for head in live.nonzero().flatten().tolist():
            attended = attended + z[..., columns[head]] @ weights["weight"][:, columns[head]].t()
        y = x + attended + (0 if extra is None else extra)
        keep, more = chosen.layers["ffn"]
        ffn = units.DenseFFN.of_routed(model.ffn)
        assert ffn.down_bias is not None
        fed = ffn.down_bias + ffn.hidden(y)[..., keep] @ ffn.down[keep]
        y = y + fed + (0 if more is None else more)
        torch.testing.assert_close(found, model.out(y), rtol=1e-4, atol=1e-4)

    everything = static.plan(rankings, {"heads": 1.0, "ffn": 1.0}, compensate=True, note="")
    with static.pruned(model, everything):
        error = (model(ids()) - dense).detach().abs().max()
        assert float(error) <= 2e-6 * float(dense.detach().abs().max())
    assert torch.equal(model(ids()), at_budget)
    assert "forward" not in model.ffn.__dict__
    assert model.heads.dropped is not None


def test_mean_compensation_keeps_the_mean_of_a_layer() -> None:
    model = Language()
    rankings = static.rank(model, model, [ids()])
    caught: list[Tensor] = []
    handle = model.heads.register_forward_hook(lambda _m, _a, y: caught.append(y))
    chosen = static.plan(rankings, {"heads": 0.25}, compensate=True, note="")
    with static.all_live(model):
        model(ids())
    with static.pruned(model, chosen):
        model(ids())
    handle.remove()
    means = [y.flatten(0, 1).mean(0) for y in caught]
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-4)


def test_refitted_columns_are_the_least_squares_solution() -> None:
    model = Language()
    rankings = static.rank(model, model, [ids()])
    chosen = static.plan(rankings, {"ffn": 0.5}, compensate=True, note="", refit=True)
    (live, bias), down = chosen.layers["ffn"], chosen.rows["ffn"]
    caught: list[Tensor] = []
    handle = model.ffn.register_forward_hook(lambda _m, a, y: caught.extend((a[0], y)))
    with static.all_live(model):
        model(ids())
    handle.remove()
    x, y = (t.reshape(-1, t.shape[-1]) for t in caught)
    ffn = units.DenseFFN.of_routed(model.ffn)
    hidden = ffn.hidden(x)[:, live]
    assert ffn.down_bias is not None
    assert bias is not None
    found = hidden @ down[live] + ffn.down_bias + bias
    design = torch.cat([hidden, torch.ones(len(x), 1)], 1)
    best = design @ torch.linalg.lstsq(design, y).solution
    _, plain = static.plan(rankings, {"ffn": 0.5}, compensate=True, note="").layers["ffn"]
    assert plain is not None
    masked = hidden @ ffn.down[live] + ffn.down_bias + plain
    assert down[~live].abs().sum() == 0
    errors = [float((t - y).detach().square().sum()) for t in (best, found, masked)]
    assert errors[0] <= errors[1] <= 1.1 * errors[0]  # a little ridge
    assert errors[1] < errors[2]


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = Language()
    rankings = static.rank(model, model, [ids()])
    before = model(ids())
    chosen = static.plan(rankings, {"heads": 0.5, "ffn": 0.5}, compensate=True, note="")
    with pytest.raises(RuntimeError, match="mine"), static.pruned(model, chosen):
        raise RuntimeError("mine")
    assert torch.equal(model(ids()), before)


# ---------------------------------------------------------------------------- quality


def test_quality_has_dense_routed_and_static_rows() -> None:
    model = Language()
    model.head_router.set_active(0.75)
    model.train()
    before = model(ids())
    seen: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))

    found = evaluate.quality(
        model, [ids()], text="t", active=(1.0, 0.5), calibration=[ids()], progress=progress
    )
    assert [(r.model, r.active) for r in found.rows] == [
        ("dense", 1.0), ("routed", 1.0), ("routed", 0.5), ("static pruning", 0.5), ("TEAL", 0.5),
    ]  # fmt: skip
    dense, full, half, pruned, _ = found.rows
    assert full.perplexity == pytest.approx(dense.perplexity, rel=1e-5)
    assert full.realised == 1
    assert half.realised == pytest.approx(0.5)
    assert pruned.realised == pytest.approx(0.5)
    assert "ranked by" in pruned.note
    assert half.kl is not None
    assert half.kl > 0
    assert half.ratio == half.perplexity / dense.perplexity
    assert seen[-1] == ("evaluate", 12, 12)
    assert [s[1] for s in seen] == list(range(1, 13))
    assert found.verdicts()
    assert found.tokens == 6 * 8
    assert torch.equal(model(ids()), before)
    assert model.training


def test_routing_counts_what_the_routers_select() -> None:
    model = Language()
    model.head_router.order = torch.randperm(H, generator=torch.Generator().manual_seed(3))
    text = ids(rows=5, tokens=12)
    found = evaluate.routing(model, list(text.split(2)), text="t", active=0.5, segment=4)
    assert found is not None
    assert (found.tokens, found.segment) == (60, 4)
    heads, experts = found.rows
    assert (heads.router, experts.router) == ("head_router", "ffn.router")
    assert (heads.units, heads.shared, heads.rule) == (H, 1, "top-k")
    assert model.head_router.active == 1  # turned back
    set_active(model, 0.5)
    select = model.head_router(model.embed(text))
    routed = model.head_router.order[1:].sort().values
    assert heads.numbers == tuple(routed.tolist())
    want = (select[..., routed] != 0).double().mean((0, 1))
    assert heads.live == pytest.approx(tuple(want.tolist()))
    assert heads.live_ratio == pytest.approx(float(want.mean()))
    masks = [row[:, routed] != 0 for row in select]
    assert heads.srp == pytest.approx(metrics.segment_routing(masks, 4)[0])
    assert heads.sch == pytest.approx(metrics.segment_cache(masks, 4, 2.0))
    short = evaluate.routing(model, [text], text="t", active=0.5, tokens=20)
    assert short is not None and short.tokens == 24  # whole sequences
    assert evaluate.routing(nn.Linear(2, 2), [text], text="t", active=0.5) is None


def test_quality_has_intervals_of_whole_texts() -> None:
    model = Language()
    text = ids(rows=60)
    texts = [row // 2 for row in range(60)]
    found = evaluate.quality(model, [text], text="t", active=(0.5,), texts=texts)
    row = found.row("routed")
    assert row is not None and found.resampled is not None
    assert (found.resampled.unit, found.resampled.count) == ("texts", 30)
    for value, within in (
        (row.ratio, row.ratio_within), (row.kl, row.kl_within), (row.top1, row.top1_within),
    ):  # fmt: skip
        assert value is not None and within is not None
        assert within.low < value < within.high
    again = evaluate.quality(model, [text], text="t", active=(0.5,), texts=texts)
    assert again == found
    none = evaluate.quality(model, [text], text="t", active=(0.5,), resamples=0)
    assert none.resampled is None and none.rows[1].ratio_within is None
    lines = found.render(100).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("resamples of 30 texts" in line for line in lines)


def test_quality_without_calibration_says_so() -> None:
    found = evaluate.quality(Language(), [ids()], text="t", active=(0.5,))
    assert found.row("static pruning") is None
    assert "was not measured" in found.verdicts()[0]


def test_static_row_is_the_best_of_those_tried() -> None:
    model = Language()
    found = evaluate.quality(model, [ids()], text="t", active=(0.5,), calibration=[ids()])
    best = found.row("static pruning", 0.5)
    assert best is not None
    rankings = static.rank(model, model, [ids()])
    tried: list[Any] = []
    for refit in (True, False):
        chosen = static.plan(
            rankings, {"heads": 0.5, "ffn": 0.5}, compensate=True, note="", refit=refit
        )
        with static.pruned(model, chosen):
            tried.append(evaluate.perplexity(model, [ids()]))
    assert best.perplexity == pytest.approx(min(tried), rel=1e-5)
