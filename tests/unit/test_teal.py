"""TEAL against plain masks; its operations are the routed model's, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import contenders, evaluate, teal
from sparsify.counted import Tally, dense_operations
from sparsify.runtime.counters import reset
from sparsify.runtime.dial import set_active
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.spec import RoutedModule
from sparsify.static_pruning import all_live
from sparsify.static_units import DenseFFN
from tests.unit.test_evaluate import VOCAB, D, F, H, Language, ids


class Projections(nn.Module):
    """Two routed projections and a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCAB, D, generator=g))
        shapes = ((F, D), (VOCAB, F))
        weights = [torch.randn(shape, generator=g) for shape in shapes]
        self.a, self.b = (
            RoutedLinear.from_dense(w, None, Magnitude(w.norm(dim=0))) for w in weights
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.b(torch.tanh(self.a(self.embed(tokens))))
        return logits


def cut(values: Tensor, threshold: float) -> Tensor:
    return values * (values.abs() >= threshold)


def test_sites_are_cut_where_the_paper_cuts() -> None:
    model = Language()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    run = teal.Teal(
        model, model.ffn, {"heads.x": 0.0, "ffn.x": 0.5, "ffn.h": 0.25},
        {"heads.x": 1.0, "ffn.x": 2.0, "ffn.h": 1.0},
    )  # fmt: skip
    found = run(x)
    ffn = DenseFFN.of_routed(model.ffn)
    hidden = ffn.hidden(cut(x, 0.5))
    torch.testing.assert_close(found, ffn.output(cut(hidden, 0.25)))
    live = 2 * int((x.abs() >= 0.5).sum()) + int((hidden.abs() >= 0.25).sum())
    assert run.flops == pytest.approx(live / (5 * (2 * D + F)))


def test_everything_live_is_the_dense_model() -> None:
    for model in (Language(), Projections()):
        each = teal.sites(model)
        assert each is not None
        with all_live(model):
            dense = model(ids())
        run = teal.Teal(model, model, dict.fromkeys(each, 0.0), each)
        torch.testing.assert_close(run(ids()), dense, rtol=1e-4, atol=1e-4)
        assert run.flops == 1
        assert not any("forward" in m.__dict__ for m in model.modules())


def test_sites_cost_what_the_matrices_cost() -> None:
    model = Language()
    each = teal.sites(model)
    assert each is not None
    assert set(each) == {"heads.x", "ffn.x", "ffn.h"}
    assert each["ffn.x"] * D + each["ffn.h"] * F == dense_operations(model.ffn) == 2 * 3 * D * F
    width = model.heads.blocks.shape[1]
    assert each["heads.x"] * H * width == dense_operations(model.heads)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_thresholds_keep_the_fraction(keep: float) -> None:
    model = Projections()
    seen = teal.magnitudes(model, model, [ids(40), ids(7)])
    found = seen.thresholds(keep)
    values = model.embed(torch.cat([ids(40), ids(7)])).abs()
    assert float((values >= found["a.x"]).float().mean()) == pytest.approx(keep, abs=0.03)
    assert teal.Magnitudes(seen.counts).thresholds(1.0) == {"a.x": 0.0, "b.x": 0.0}


def test_the_fraction_is_moved_until_as_much_is_counted() -> None:
    model = Projections()
    seen = teal.magnitudes(model, model, [ids(40)])
    other = ids(40) // 2  # other text than the thresholds are from

    def probe(run: Any) -> None:
        run(other)

    run, keep = teal.fitted(model, model, seen, 0.5, probe)
    run(other)
    assert run.flops == pytest.approx(0.5, abs=0.02)
    assert 0 < keep < 1


def test_routed_work_is_counted_as_it_was_done() -> None:
    model = Language()
    set_active(model, 0.5)
    tally = Tally(model)
    tally.reset()
    with torch.no_grad():
        model(ids())
    tally.add()
    tokens = ids().numel()
    width = model.heads.blocks.shape[1]
    done = 0.0
    ffn, heads = model.ffn.counter, model.heads.counter
    done += 3 * ffn.units_live * (F // 4) * D + heads.units_live * width * D
    done += tokens * (4 * D + H * D)  # what stands in for dead experts and heads
    done += tokens * D * (3 + H - 1)  # the routers
    dense = tokens * (3 * D * F + H * width * D)
    assert tally.flops == pytest.approx(done / dense)


def test_all_live_counts_as_dense() -> None:
    for model in (Language(), Projections()):
        tally = Tally(model)
        tally.reset()
        with torch.no_grad():
            model(ids())
        tally.add()
        assert tally.flops == 1
        assert set(tally.shares.values()) == {1.0}


def test_modules_of_other_kinds_have_no_baseline() -> None:
    class Other(RoutedModule):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Projections(), Other())
    assert teal.sites(model) is None
    assert not Tally(model).known
    assert contenders.teal_at(model, model, [], [ids()], lambda run: None) == []


def test_quality_has_a_teal_row_at_the_counted_operations() -> None:
    model = Projections()
    reset(model)
    found = evaluate.quality(model, [ids(30)], text="t", active=(0.5,), calibration=[ids(40)])
    routed, rival = found.row("routed", 0.5), found.row("TEAL", 0.5)
    assert routed is not None and rival is not None
    assert routed.flops == pytest.approx(0.5)
    assert rival.flops == pytest.approx(0.5, abs=0.02)
    assert rival.to_routed is not None
    low, high = rival.to_routed.low, rival.to_routed.high
    assert low <= rival.perplexity / routed.perplexity <= high
    assert any("TEAL" in verdict for verdict in found.verdicts())
