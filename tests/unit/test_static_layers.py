"""Static layer dropping: what is ranked, what is dropped, its row beside depth routing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import sparsify
from sparsify.evaluate import quality
from sparsify.runtime.dial import set_active
from sparsify.static_layers import layer_plans, rank_layers
from tests.unit.test_recursion import deep_llama

IDS = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model() -> Any:
    return sparsify.compile(
        deep_llama()[1], "depth-mod", calibration=[IDS.repeat(2, 1)], reproducer=None
    )


def test_ranking_is_that_of_the_streams(model: Any) -> None:
    found = rank_layers(model, model, [IDS])
    with torch.no_grad():
        streams = deep_llama()[0](IDS, output_hidden_states=True).hidden_states
    # transformers gives the last one after the final norm: it is left out
    for i in range(5):
        for j in range(i, 5):
            a, b = streams[i], streams[j + 1]
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
            assert float(found.turn[i, j]) == pytest.approx(1 - float(cosine), abs=1e-5)
    torch.testing.assert_close(
        found.change[2], (streams[3] - streams[2]).mean((0, 1)), rtol=1e-4, atol=1e-5
    )
    assert found.neighbours(2) == min(
        ([i, i + 1] for i in range(5)), key=lambda run: float(found.turn[run[0], run[1]])
    )


@torch.no_grad()
def test_dropped_layers_are_gone(model: Any) -> None:
    ranking = rank_layers(model, model, [IDS])
    plans = layer_plans(ranking, 0.5)
    assert all(plan.active == 0.5 and len(plan.dropped) == 3 for plan in plans)
    plan = plans[1]
    assert set(plan.dropped.values()) == {None}
    dense = deep_llama()[0]
    kept = [i for i, path in enumerate(ranking.paths) if path not in plan.dropped]
    x = dense.model.embed_tokens(IDS)
    rotary = dense.model.rotary_emb(x, torch.arange(24)[None])
    mask = torch.zeros(24, 24).masked_fill(~torch.ones(24, 24).tril().bool(), -torch.inf)
    for i in kept:
        out = dense.model.layers[i](x, attention_mask=mask[None, None], position_embeddings=rotary)
        x = out[0] if isinstance(out, tuple) else out
    wanted = dense.lm_head(dense.model.norm(x))
    with plan.applied(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    set_active(model, 1.0)
    torch.testing.assert_close(model(input_ids=IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_it_stands_in_the_quality_table(model: Any) -> None:
    found = quality(model, [IDS], text="ids", active=(1.0, 0.5), calibration=[IDS])
    static = [row for row in found.rows if row.model == "static pruning"]
    assert len(static) == 1 and "layers" in static[0].note
    routed = next(row for row in found.rows if row.model == "routed" and row.active == 0.5)
    assert routed.realised is not None and static[0].active >= routed.realised - 1e-6
    assert dataclasses.asdict(static[0])["ratio"] > 1
