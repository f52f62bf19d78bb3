"""Budget search: measured where it says, reproduced from its text, never worse than even."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import zoo
from sparsify.corpus import token_blocks
from sparsify.errors import BadInput
from sparsify.pipeline import State
from sparsify.runtime.dial import set_each
from sparsify.searching_goal import target_of
from sparsify.searching_measure import Measure, divergence, sample
from sparsify.searching_result import Search
from sparsify.searching_text import pipeline_text
from sparsify.searching_units import units_of

ALL = "ffn-moe{experts=8},attn-moh,hidden-route"


def text(seed: int = 0) -> list[torch.Tensor]:
    """Eight batches of random ids (4, 32)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (4, 32), generator=g) for _ in range(8)]


def search(name: str, target: str, passes: str, **options: Any) -> Search:
    return sparsify.search(
        zoo.build(name).model, target, passes=passes, calibration=text(),
        **{"tokens": 128, "rounds": 1, "points": 2, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Search:
    return search("llama", "flops=0.85", ALL)


def compiled(name: str, pipeline: str) -> tuple[sparsify.SparseModel, State]:
    states: list[State] = []
    sparse = sparsify.compile(
        zoo.build(name).model, pipeline, calibration=text(), reproducer=None,
        on_step=lambda _, state: states.append(state),
    )  # fmt: skip
    return sparse, states[-1]


# ---------------------------------------------------------------------------- what it finds


def test_meets_its_target_and_is_the_best_of_all_it_tried(found: Search) -> None:
    assert found.found.reached <= 0.85 + 1e-3
    assert found.found.kl == min(c.kl for c in found.tried)
    assert [c.name for c in found.tried] == ["even", "dial", "search", "search, round 1"]
    assert all(c.reached <= 0.85 + 1e-3 for c in found.tried)
    assert found.found.predicted is None or found.found.predicted > 0


def test_the_front_loses_more_where_it_costs_less(found: Search) -> None:
    assert len(found.front) == len(found.even) == 2
    costs = [c.reached for c in found.front]
    assert costs == sorted(costs, reverse=True)
    assert found.front[0].kl < found.front[1].kl
    for one in found.front:
        sparsify.api.stages_of(one.pipeline)


def test_its_text_reproduces_it(found: Search) -> None:
    sparse, state = compiled("llama", found.pipeline)
    assert "active@" in found.pipeline
    units = units_of(sparse.graph, state.placed, context=512)
    dials = {r: r.active for p in state.placed for r in p.routers}
    settings = {r: r.setting for r in dials}
    ids, _ = sample(text(), 1024, 128, 128)
    measure = Measure(sparse, units, ids, context=512)
    again = measure.full(dials)
    assert {r: r.setting for r in dials} == settings  # the text set what the search measured
    assert again.kl == found.found.kl
    assert pipeline_text(ALL, state.placed, dials) == found.pipeline


def test_the_searched_model_is_there_as_it_was_found(found: Search) -> None:
    assert found.sparse is not None
    assert list(found.settings) == [c.name for c in found.tried]
    best = found.settings[found.found.name]
    assert {r: r.active for r in best} == best
    assert not {"sparse", "settings"} & set(found.to_dict())


def test_two_runs_find_the_same(found: Search) -> None:
    again = search("llama", "flops=0.85", ALL)
    fixed = {"seconds": {}, "machine": {}}
    assert dataclasses.replace(again, **fixed) == dataclasses.replace(found, **fixed)


def test_bytes_of_another_architecture() -> None:
    found = search("gpt2", "bytes=0.8", "hidden-route", rounds=0, points=0)
    assert found.found.reached <= 0.8 + 1e-3
    assert len(found.units) == 8
    assert found.front == ()


# ---------------------------------------------------------------------------- how it measures


@pytest.mark.parametrize("passes", [ALL, pytest.param("hidden-route", marks=pytest.mark.slow)])
def test_a_replay_is_the_whole_run(passes: str) -> None:
    sparse, state = compiled("llama", passes)
    units = units_of(sparse.graph, state.placed, context=512)
    assert len(units) >= 6
    ids = torch.cat(text()[:1])
    measure = Measure(sparse, units, [ids], context=512)
    routers = measure.routers
    for base in (dict.fromkeys(routers, 1.0), dict.fromkeys(routers, 0.5)):
        measure.record(base)
        for unit in units:
            change = unit.setting(len(unit.levels) - 1)
            replayed = measure.changed(unit, change)
            if passes == "hidden-route":
                assert replayed == measure.full({**base, **change})
            set_each(sparse.graph, base)
            for router, active in change.items():
                router.set_active(active, warn=False)
            logits = sparse(input_ids=ids, use_cache=False).logits
            kl, _ = divergence(logits, measure.teacher[0], ids)
            assert float(kl.mean()) == pytest.approx(replayed.kl, rel=1e-6, abs=1e-9)


def test_divergence_is_the_textbook_one() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 70, 11, generator=g), torch.randn(2, 70, 11, generator=g)
    ids = torch.randint(11, (2, 70), generator=g)
    kl, nll = divergence(a, b.log_softmax(-1), ids)
    p, q = b[:, :-1].softmax(-1).double(), a[:, :-1].softmax(-1).double()
    assert float(kl.sum()) == pytest.approx(float((p * (p.log() - q.log())).sum()), rel=1e-5)
    wanted = -q.log().gather(-1, ids[:, 1:, None]).sum()
    assert nll == pytest.approx(float(wanted), rel=1e-5)


def test_levels_go_down_in_cost_and_up_in_loss() -> None:
    sparse, state = compiled("llama", ALL)
    before = {r: r.setting for p in state.placed for r in p.routers}
    for unit in units_of(sparse.graph, state.placed, context=512):
        costs = [level.cost.flops for level in unit.levels]
        shapes = [level.shape for level in unit.levels]
        assert costs[0] > costs[-1]  # the first step may cost more: what stands in for the dead
        assert costs[1:] == sorted(costs[1:], reverse=True)
        assert shapes == sorted(shapes)
        assert unit.levels[0].values == (1.0,) * len(unit.routers)
    assert {r: r.setting for p in state.placed for r in p.routers} == before


def test_a_file_is_fitted_and_measured_on_different_lines(tmp_path: Path) -> None:
    """A file is sampled by size: what was fitted on is the beginning of a larger sample."""
    file = tmp_path / "long.txt"
    lines = (
        f"line {n}: {hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()}" for n in range(4000)
    )
    file.write_text("\n\n".join(lines))
    fitted = torch.cat(token_blocks(file, Letters(), limit=4096)[1])
    both = torch.cat(token_blocks(file, Letters(), limit=4096 + 512)[1])
    assert torch.equal(both[: len(fitted)], fitted)
    ids, note = sample([both], 4096, 512, 128)
    assert note == ""
    rows = {tuple(row) for row in fitted.tolist()}
    assert not rows & {tuple(row) for batch in ids for row in batch.tolist()}


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 90 for letter in text]


def test_text_to_measure_on_is_new_where_there_is_enough() -> None:
    batches = text()
    ids, note = sample(batches, 512, 96, 64)
    assert torch.equal(torch.cat(ids), batches[4][:3])
    assert note == ""
    ids, note = sample(batches, 5000, 96, 64)
    assert torch.equal(torch.cat(ids), batches[0][:3])
    assert "short" in note


# ---------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("flop=0.6", "did you mean 'flops'"),
        ("flops", "above 0 and below 1"),
        ("flops=60%", "above 0 and below 1"),
        ("bytes=1", "above 0 and below 1"),
        ("speed=0.9", "above 1"),
        ("latency=3", "flops=0.6, bytes=0.6 or speed=1.5"),
    ],
)
def test_targets_that_are_none(given: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        target_of(given)
    assert said in caught.value.render()


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(BadInput, match=r"cannot reach flops=0\.1") as caught:
        search("llama", "flops=0.1", "hidden-route")
    assert "flops=0." in str(caught.value.why)


def test_refusals() -> None:
    with pytest.raises(BadInput, match="stays within KL"):
        search("llama", "flops=0.8", ALL, max_kl=1e-6, rounds=0, points=0)
    with pytest.raises(BadInput, match="needs calibration text"):
        sparsify.search(zoo.build("llama").model, "flops=0.8", calibration=None)
    with pytest.raises(BadInput, match="tokenizer"):
        sparsify.search(zoo.build("llama").model, "flops=0.8")
    with pytest.raises(BadInput, match="are no budgets"):
        search("llama", "flops=0.8", ALL, levels=(1.0,))
    with pytest.raises(BadInput, match="has a budget to search"):
        search("llama", "flops=0.8", "attn-mot")
    bert = zoo.build("bert")
    with pytest.raises(BadInput, match="causal language model"):
        sparsify.search(bert.model, "flops=0.8", example=bert.example, calibration=text())
