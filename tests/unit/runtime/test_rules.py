"""Routing rules: each against an independent implementation or hand values, and their laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import BadInput
from sparsify.runtime.router import Router
from sparsify.runtime.rule import Cut, RoutingRule, select
from sparsify.runtime.rules import RULES, GroupTopK, Moh, SigmoidTopK, SoftmaxTopK, TopK, rule_of
from sparsify.runtime.rules_cut import DenseToSparse, ExpertChoice, Null, Relu, TopP, annealed
from sparsify.runtime.rules_pruned import PrunedTopK
from sparsify.runtime.spec import from_spec
from sparsify.runtime.unlearned import given, sparsity_scores

# A router of 6 routed units under every rule, with options that fit.
EVERY: tuple[RoutingRule, ...] = tuple(
    rule_of(name, options)
    for name, options in {
        **{name: {} for name in RULES},
        "softmax-top-k": {"weights": "scaled"},
        "group-top-k": {"groups": 3, "weights": "scaled"},
        "sigmoid-top-k": {"groups": 3, "weights": "scaled"},
        "null": {"nulls": 3},
        "pruned-top-k": {"mu": 0.3, "important": 3.0},
        "relu": {"weights": "scaled"},
    }.items()
)
NAMES = [str(rule) for rule in EVERY]


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def made(rule: RoutingRule, *, routed: int = 6, shared: int = 1, seed: int = 0) -> Router:
    """A calibrated router."""
    router = Router(
        draw(routed, 8, seed=seed), draw(routed, seed=seed + 1), shared=shared, rule=rule
    )
    router.calibrate(draw(300, 8, seed=seed + 2))
    return router.eval()


# ---------------------------------------------------------------------------- references


def test_softmax_top_k() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    e = [math.exp(v) for v in (1, 3, 2, 0)]
    for rule, total in ((SoftmaxTopK(), e[1] + e[2]), (SoftmaxTopK(renormalise=False), sum(e))):
        found = select(rule, scores, Cut(2))
        want = torch.tensor([[0, e[1] / total, e[2] / total, 0]])
        torch.testing.assert_close(found.weights, want)
    ids, weights = select(SoftmaxTopK(), scores, Cut(2)).ids()
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_sigmoid_chooses_with_the_correction_and_weighs_without() -> None:
    scores = torch.tensor([[0.0, 1.0, -1.0]])
    rule = SigmoidTopK(weights="paper")
    sigmoid = [1 / (1 + math.exp(-v)) for v in (0, 1, -1)]
    plain = select(rule, scores, Cut(1))
    assert plain.mask.tolist() == [[False, True, False]]
    moved = select(rule, scores, Cut(2), correction=torch.tensor([0.0, 0.0, 0.6]))
    assert moved.mask.tolist() == [[False, True, True]]
    total = sigmoid[1] + sigmoid[2]
    want = torch.tensor([[0, sigmoid[1] / total, sigmoid[2] / total]])
    torch.testing.assert_close(moved.weights, want)


def test_node_limit_against_a_loop() -> None:
    rule = SigmoidTopK(groups=4, groups_kept=2, weights="paper")
    scores = draw(20, 12)
    found = select(rule, scores, Cut(4))
    for row, live in zip(torch.sigmoid(scores).tolist(), found.mask.tolist(), strict=True):
        groups = [row[i : i + 3] for i in range(0, 12, 3)]
        ranked = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))
        allowed = [i for i in range(12) if i // 3 in ranked[:2]]
        best = sorted(allowed, key=lambda i: -row[i])[:4]
        assert [i for i, v in enumerate(live) if v] == sorted(best)


def test_more_groups_are_kept_where_k_needs_them() -> None:
    rule = SigmoidTopK(groups=4, groups_kept=1)
    assert (select(rule, draw(9, 8), Cut(5)).mask.sum(-1) == 5).all()
    assert select(rule, draw(9, 8), Cut(8)).mask.all()


@pytest.mark.parametrize("important", [math.inf, 2.4])
def test_pruned_against_a_loop(important: float) -> None:
    scores = draw(40, 6)
    mask = select(PrunedTopK(mu=0.4, important=important), scores, Cut(4)).mask
    for row, live in zip(scores.tolist(), mask.tolist(), strict=True):
        chosen = sorted(range(6), key=lambda i: -row[i])[:4]
        total = sum(math.exp(row[i]) for i in chosen)
        weight = {i: math.exp(row[i]) / total for i in chosen}
        kept = [i for i in chosen if weight[i] >= 0.4 * weight[chosen[0]]]
        spared = math.log(sum(map(math.exp, row))) >= important
        assert [i for i, v in enumerate(live) if v] == sorted(chosen if spared else kept)
    assert 1 < float(mask.sum(-1).double().mean()) < 4


def test_nothing_is_pruned_at_mu_zero_or_with_all_live() -> None:
    scores = draw(40, 6)
    assert torch.equal(
        select(PrunedTopK(mu=0), scores, Cut(3)).mask, select(TopK(), scores, Cut(3)).mask
    )
    assert select(PrunedTopK(mu=0.9), scores, Cut(6)).mask.all()


def test_grouped_against_a_loop() -> None:
    scores = draw(20, 12)
    mask = select(GroupTopK(groups=4), scores, Cut(8)).mask
    for row, live in zip(scores.tolist(), mask.tolist(), strict=True):
        best = [
            i for g in range(4) for i in sorted(range(3 * g, 3 * g + 3), key=lambda i: -row[i])[:2]
        ]
        assert [i for i, v in enumerate(live) if v] == sorted(best)


def test_moh_two_stages_by_hand() -> None:
    scores, extra = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.5, -0.5]])
    cut = Cut(2, extra=extra)
    shared = torch.tensor([1.0, math.e]) / (1 + math.e)
    betas = torch.tensor([math.exp(0.5), math.exp(-0.5)])
    betas = betas / betas.sum()
    e = torch.tensor([math.exp(2), 1.0, math.e])
    paper = select(Moh(weights="paper"), scores, cut, shared=2)
    assert paper.shared is not None
    torch.testing.assert_close(paper.shared[0], betas[0] * shared)
    torch.testing.assert_close(paper.weights[0], betas[1] * torch.tensor([e[0], 0, e[2]]) / e.sum())
    scaled = select(Moh(), scores, cut, shared=2)  # as its code: times 2, S, and live heads
    assert scaled.shared is not None
    torch.testing.assert_close(scaled.shared[0], 2 * betas[0] * 2 * shared)
    kept = torch.tensor([e[0], 0, e[2]]) / (e[0] + e[2])
    torch.testing.assert_close(scaled.weights[0], 2 * betas[1] * 2 * kept)


def test_top_p_is_the_smallest_set() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, count in ((0.4, 1), (0.5, 1), (0.6, 2), (0.85, 3), (0.97, 4)):
        mask = select(TopP(), scores, Cut(3, 1 - p)).mask
        assert int(mask.sum()) == count, p
        assert mask[:count].all()


@settings(max_examples=30, deadline=None)
@hypothesis_given(seed=st.integers(0, 999), p=st.floats(0.05, 0.95), units=st.integers(2, 9))
def test_top_p_reaches_p_and_no_smaller_set_does(seed: int, p: float, units: int) -> None:
    scores = draw(7, units, seed=seed) * 2
    found = select(TopP(weights="paper"), scores, Cut(units - 1, 1 - p))
    probability = torch.softmax(scores, -1)
    for row, live in zip(probability.tolist(), found.mask.tolist(), strict=True):
        size = sum(live)
        assert sum(v for v, on in zip(row, live, strict=True) if on) >= p - 1e-9
        if size > 1:
            smaller = max(map(sum, itertools.combinations(row, size - 1)))
            assert smaller < p + 1e-9
    torch.testing.assert_close(found.weights, probability * found.mask)


def test_relu_by_hand() -> None:
    scores = torch.tensor([[-1.0, 0.5, 2.0]])
    paper = select(Relu(weights="paper"), scores, Cut(1.5, 0.0))
    assert paper.weights.tolist() == [[0, 0.5, 2]]
    moved = select(Relu(weights="scaled"), scores, Cut(1.5, -2.0))  # 1, 2.5, 4 above -2
    torch.testing.assert_close(moved.weights, torch.tensor([[1, 2.5, 4]]) / 2.5)
    far = select(Relu(weights="scaled"), scores, Cut(2.9, -1e6))
    torch.testing.assert_close(far.weights, torch.ones(1, 3), atol=1e-5, rtol=0)


def test_expert_choice_takes_the_best_tokens() -> None:
    scores = draw(2, 10, 4)
    found = select(ExpertChoice(weights="paper"), scores, Cut(2, training=True))
    assert (found.mask.sum(1) == 5).all()  # T * keep / R, in every sequence
    for sequence, unit in itertools.product(range(2), range(4)):
        mine = found.mask[sequence, :, unit]
        column = scores[sequence, :, unit]
        assert column[mine].min() > column[~mine].max()
    want = torch.softmax(scores, -1) * found.mask
    torch.testing.assert_close(found.weights, want)


def test_expert_choice_decodes_token_by_token() -> None:
    router = made(ExpertChoice(), shared=0)
    router.set_active(0.5)
    x = draw(3, 40, 8, seed=2)
    whole = router(x)
    alone = torch.stack([router(x[:, t : t + 1])[:, 0] for t in range(40)], dim=1)
    assert torch.equal(whole, alone)
    seen = draw(300, 8, seed=2)  # what it was calibrated on: every unit has its share
    torch.testing.assert_close((router(seen) != 0).double().mean(0), torch.full((6,), 0.5).double(),
                               atol=0.01, rtol=0)  # fmt: skip
    router.train()
    assert (router(x).ne(0).sum(1) == 20).all()
    zero = Router(draw(6, 8), rule=ExpertChoice(decode="zero")).eval()
    zero.set_active(0.5)
    assert torch.equal(zero(x) != 0, zero.scores(x) > 0)


def test_nulls_against_a_loop() -> None:
    rule = Null(nulls=3, weights="paper")
    scores, extra = draw(20, 5), draw(20, 3, seed=1)
    cut = Cut(2.5, 0.0, extra=extra)
    k = rule.chosen(5, 2.5)
    assert k == 4  # 2.5 * 8 / 5
    found = select(rule, scores, cut)
    for t in range(20):
        row = [*scores[t].tolist(), *extra[t].tolist()]
        best = sorted(range(8), key=lambda i: -row[i])[:k]
        true = [i for i in best if i < 5]
        assert found.mask[t].nonzero().flatten().tolist() == sorted(true)
        assert int(found.aux["null"][t].sum()) == k - len(true)
        total = sum(math.exp(row[i]) for i in true)
        for i in range(5):
            want = math.exp(row[i]) / total if i in true else 0.0
            assert float(found.weights[t, i]) == pytest.approx(want)


def test_calibrated_nulls_meet_the_budget() -> None:
    router = made(Null(nulls=6), shared=0)
    x = draw(300, 8, seed=2)
    for active in (0.3, 0.5, 0.8):
        router.set_active(active)
        live = (router(x) != 0).double()
        assert abs(float(live.mean()) - active) < 0.06
        k = Null(nulls=6).chosen(6, router.budget)
        assert k - 6 <= int(live.sum(-1).min()) <= int(live.sum(-1).max()) <= k
    assert len(live.sum(-1).unique()) > 1  # tokens use as many as they need


def test_dense_to_sparse_sharpens() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    live = {}
    for temperature in (2.0, 0.5, 0.2):
        rule = DenseToSparse(weights="paper", temperature=temperature, floor=0.02)
        gates = torch.softmax(scores / temperature, -1)
        found = select(rule, scores, Cut(3.5, rule.default_cut(0.5)))
        torch.testing.assert_close(found.weights, gates * (gates > 0.02))
        live[temperature] = int(found.mask.sum())
    assert live == {2.0: 4, 0.5: 2, 0.2: 1}


def test_gumbel_noise_follows_the_probabilities() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([1.0, 0.0, -1.0]).expand(20000, 3)
    rule = DenseToSparse()
    first = rule.perturbed(scores, training=True).argmax(-1)  # Gumbel-max draws from softmax
    share = torch.bincount(first, minlength=3) / len(first)
    torch.testing.assert_close(share, torch.softmax(scores[0], -1), atol=0.02, rtol=0)
    assert rule.perturbed(scores, training=False) is scores


def test_annealing() -> None:
    for how in ("cosine", "exponential", "linear"):
        at = [annealed(p / 10, start=2, end=0.5, how=how) for p in range(11)]
        assert at[0] == pytest.approx(2) and at[-1] == pytest.approx(0.5)
        assert at == sorted(at, reverse=True)
    assert annealed(0.5, start=2, end=0.5, how="exponential") == pytest.approx(1)
    assert annealed(0.5, start=2, end=0.5) == pytest.approx(1.25)
    with pytest.raises(BadInput, match="annealing"):
        annealed(0.5, how="never")


def test_units_by_id() -> None:
    found = given(torch.tensor([[0, 2], [1, 1]]), 3)
    assert found.weights.tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]]
    with pytest.raises(BadInput, match="ids"):
        given(torch.tensor([3]), 3)


def test_sparsity_scores_estimate_what_relu_leaves() -> None:
    g = torch.Generator().manual_seed(0)
    up = torch.randn(3, 4000, 16, generator=g) + torch.tensor([-0.3, 0.0, 0.3])[:, None, None]
    bias = torch.randn(3, 4000, generator=g) * 0.1
    x = torch.rand(5, 16, generator=g)
    scores = sparsity_scores(x, up, bias)
    active = (torch.einsum("td,nmd->tnm", x, up) + bias > 0).float().mean(-1)
    torch.testing.assert_close(-scores, active, atol=0.03, rtol=0)
    assert (scores.argmax(-1) == 0).all()
    one = sparsity_scores(torch.ones(1, 1), torch.tensor([[[0.0], [2.0]]]))  # mean 1, deviation 1
    assert float(one) == pytest.approx(-(1 + math.erf(1 / math.sqrt(2))) / 2)


# ---------------------------------------------------------------------------- laws


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_dense_limit(rule: RoutingRule) -> None:
    """All live with weight one, whatever the scores, until training moves the weights."""
    router = made(rule)
    select_all = router(draw(9, 8).requires_grad_())
    assert torch.equal(select_all.detach(), torch.ones(9, 7, dtype=torch.float64))


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_budget(rule: RoutingRule) -> None:
    router = made(rule)
    x = draw(300, 8, seed=2)
    for active in (0.3, 0.5, 0.9):
        router.set_active(active)
        live = (router(x) != 0)[:, 1:]
        if rule.mean:
            slack = 0.1 if rule.name == "null" else 0.02
            assert abs(float(live.double().mean()) - router.budget / 6) < slack
        else:
            used = live.sum(-1)
            assert used.max() == router.budget
            assert rule.name == "pruned-top-k" or used.min() == router.budget
            assert router.budget % rule.step == 0
            assert abs(router.budget - router.wanted(active)) <= max(rule.step / 2, 0.5)


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_units_and_tokens_may_be_permuted(rule: RoutingRule) -> None:
    scores = draw(4, 10, 6)
    router = made(rule)
    router.set_active(0.6)
    extra = router.extra_scores(draw(4, 10, 8))
    cut = router.cut(extra)
    found = select(rule, scores, cut, shared=1)
    if rule.step == 1 and rule.name != "prefix" and not getattr(rule, "groups", 1) > 1:
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        limit = cut.threshold
        if isinstance(limit, Tensor):
            cut = Cut(cut.keep, limit[order], extra=extra)
        permuted = select(rule, scores[..., order], cut, shared=1)
        assert torch.equal(permuted.mask, found.mask[..., order])
        torch.testing.assert_close(permuted.weights, found.weights[..., order])
    tokens = torch.randperm(10)
    mine = Cut(cut.keep, router.threshold, extra=None if extra is None else extra[:, tokens])
    rows = select(rule, scores[:, tokens], mine, shared=1)
    assert torch.equal(rows.mask, found.mask[:, tokens])


@settings(max_examples=30, deadline=None)
@hypothesis_given(
    groups=st.integers(1, 4),
    size=st.integers(1, 4),
    each=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_moge_takes_exactly_its_share_of_each_group(
    groups: int, size: int, each: int, seed: int
) -> None:
    each = min(each, size)
    scores = draw(6, groups * size, seed=seed).round()  # with ties
    mask = select(GroupTopK(groups=groups), scores, Cut(groups * each)).mask
    assert (mask.unflatten(-1, (groups, size)).sum(-1) == each).all()


@settings(max_examples=30, deadline=None)
@hypothesis_given(
    units=st.integers(1, 6), nulls=st.integers(1, 6), keep=st.floats(0, 6), seed=st.integers(0, 99)
)
def test_true_and_null_units_add_up_to_k(units: int, nulls: int, keep: float, seed: int) -> None:
    keep = min(keep, units - 1e-6)
    rule = Null(nulls=nulls)
    cut = Cut(keep, 0.0, extra=draw(5, nulls, seed=seed + 1))
    found = select(rule, draw(5, units, seed=seed), cut)
    k = rule.chosen(units, keep)
    assert (found.mask.sum(-1) + found.aux["null"].sum(-1) == k).all()
    assert found.mask.sum(-1).min() >= k - nulls


@settings(max_examples=30, deadline=None)
@hypothesis_given(tokens=st.integers(1, 9), units=st.integers(1, 5), part=st.floats(0.05, 0.95))
def test_expert_choice_meets_its_capacity(tokens: int, units: int, part: float) -> None:
    cut = Cut(part * units, training=True)
    mask = select(ExpertChoice(), draw(2, tokens, units).round(), cut).mask
    assert (mask.sum(1) == max(math.floor(tokens * part + 0.5), 1)).all()


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_gradients_reach_scores(rule: RoutingRule) -> None:
    router = made(rule)
    router.set_active(0.6)
    x = draw(40, 8)
    (router(x) * draw(40, 7, seed=3)).sum().backward()
    assert router.weight.grad is not None and float(router.weight.grad.abs().sum()) > 0
    if router.mix is not None and rule.name != "moh":
        assert router.mix.grad is not None and float(router.mix.grad.abs()) > 0


@pytest.mark.parametrize(
    "rule",
    [
        SoftmaxTopK(), SoftmaxTopK(renormalise=False), SigmoidTopK(weights="paper", groups=3),
        GroupTopK(weights="paper", groups=3), Moh(weights="paper"), TopP(weights="paper"),
        Relu(weights="paper"), ExpertChoice(weights="paper"), Null(weights="paper", nulls=3),
        DenseToSparse(weights="paper"),
    ],
    ids=str,
)  # fmt: skip
def test_papers_weights_have_exact_gradients(rule: RoutingRule) -> None:
    """Piecewise smooth: the selection does not change within the step of the check."""
    router = made(rule, shared=0)
    router.set_active(0.6)
    cut = router.cut(router.extra_scores(draw(5, 8)))
    scores = draw(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: select(rule, s, cut).weights, (scores,))


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_spec_round_trip(rule: RoutingRule) -> None:
    router = made(rule)
    router.set_active(0.6)
    with torch.no_grad():
        for value in (router.mix, router.extra, router.extra_bias):
            if value is not None:
                value.add_(0.3)
        if router.correction is not None:
            router.correction += torch.linspace(0, 1, 6)
    again = from_spec(router.spec())
    again.load_state_dict(router.state_dict())
    assert isinstance(again, Router)
    assert again.selector == rule
    assert again.spec() == router.spec()
    x = draw(30, 8, seed=5)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), router(x))


@pytest.mark.parametrize("rule", EVERY, ids=NAMES)
def test_ties_and_no_tokens(rule: RoutingRule) -> None:
    router = Router(torch.zeros(6, 8), shared=1, rule=rule).eval()
    router.calibrate(draw(20, 8).float())
    router.set_active(0.6)
    select_all = router(draw(3, 8).float())
    assert (select_all == select_all[:1]).all()  # a fixed rule breaks ties
    assert router(torch.empty(0, 8)).shape == (0, 7)


def test_a_step_s_conditioning_selects_once() -> None:
    """Fed the noise embedding (B, 1, D), a router's selection holds for the whole step."""
    router = made(SoftmaxTopK(), shared=0)
    router.set_active(0.5)
    condition = draw(2, 1, 8)
    once = router(condition)
    assert once.shape == (2, 1, 6)
    assert torch.equal(router(condition.expand(2, 5, 8)), once.expand(2, 5, 6))


def test_corrections_stay_wide_in_half_models() -> None:
    router = made(SigmoidTopK()).to(torch.bfloat16)
    assert router.correction is not None and router.correction.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: rule_of("top-kk"), "did you mean 'top-k'|no routing rule"),
        (lambda: rule_of("top-k", {"groups": 2}), "options"),
        (lambda: rule_of("threshold", {"weights": "paper"}), "no weights"),
        (lambda: made(GroupTopK(groups=4)), "divide"),
        (lambda: made(SigmoidTopK(groups=2, groups_kept=3)), "kept"),
        (lambda: made(Null(nulls=0)), "null"),
        (lambda: made(DenseToSparse(temperature=0)), "temperature"),
        (lambda: rule_of("expert-choice", {"decode": "later"}), "decode"),
        (lambda: Router(draw(6, 8), rule="expert-choice").set_active(0.5), "calibrated"),
        (lambda: made(GroupTopK(groups=3)).set_active(0.5, k_exact=4), "cannot keep 4"),
    ],
)  # fmt: skip
def test_refusals(make: object, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        make()  # type: ignore[operator]
