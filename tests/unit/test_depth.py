"""Depth routing: against a slow reference that masks instead of gathering, and under generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsify
from sparsify import zoo
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.depth import DepthRouter, RoutedLayer
from sparsify.runtime.generate import generate
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import captured


@pytest.fixture(scope="module", params=["live", "all"])
def llama(request: Any) -> tuple[Any, Any]:
    """The dense zoo model and its routed form, half of the (token, layer) pairs live."""
    made = zoo.build("llama").model
    model: Any = sparsify.compile(
        captured("llama"), f"depth-mod{{active=0.6,kv={request.param}}}", reproducer=None
    )
    own = dict(model.named_parameters())
    made.load_state_dict({k: own[k] for k in made.state_dict() if k in own}, strict=False)
    return made.eval(), model


def reference(dense: Any, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, T, V) without a cache: every layer runs all tokens, dead keys are masked out."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    x = dense.model.embed_tokens(ids)
    rotary = dense.model.rotary_emb(x, positions)
    tokens = ids.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for number, layer in enumerate(dense.model.layers):
        router = model.get_submodule(f"model.layers.{number}.router")
        live = router.scores(x)[..., 0] > router.threshold
        seen = causal & mask.bool()[:, None]  # (B, query, key)
        if layer_of(model, number).keys is None:
            seen = seen & live[:, None]
        seen = seen | torch.eye(tokens, dtype=torch.bool)  # rows of padding see something
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
        out = layer(x, attention_mask=bias, position_embeddings=rotary)
        out = out[0] if isinstance(out, tuple) else out
        x = torch.where(live[..., None], out, x)
    logits: Tensor = dense.lm_head(dense.model.norm(x))
    return logits


def layer_of(model: Any, number: int) -> RoutedLayer:
    found: RoutedLayer = model.get_submodule(f"model.layers.{number}.layer")
    return found


@torch.no_grad()
def test_forward_equals_the_masked_reference(llama: tuple[Any, Any]) -> None:
    dense, model = llama
    ids = torch.randint(3, 120, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model.reset_counters()
    found = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0))
    assert all(0.2 < share < 0.95 for share in model.realised().values())
    wanted = reference(dense, model, ids, mask)
    torch.testing.assert_close(found.logits[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_generation_equals_the_reference(llama: tuple[Any, Any], padded: bool) -> None:
    dense, model = llama
    ids = torch.randint(3, 120, (2, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    wanted, seen = ids, mask
    for _ in range(10):
        token = reference(dense, model, wanted, seen)[:, -1].argmax(-1)
        wanted = torch.cat([wanted, token[:, None]], 1)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    ours = generate(model, ids, attention_mask=mask, max_new_tokens=10)
    assert torch.equal(ours, wanted)
    hf = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert torch.equal(hf, wanted)


@torch.no_grad()
def test_work_is_skipped(llama: tuple[Any, Any]) -> None:
    """The body of a layer sees live tokens only, and none where nobody is live."""
    _, model = llama
    layer = next(m for m in model.modules() if isinstance(m, RoutedLayer))
    sizes: list[int] = []
    usual = layer.body.forward

    def watched(rows: int, tokens: int, past: int, *inputs: Tensor) -> Any:
        assert inputs[0].shape[:2] == (rows, tokens)
        sizes.append(rows * tokens)
        return usual(rows, tokens, past, *inputs)

    layer.body.forward = watched
    try:
        model.reset_counters()
        model(input_ids=torch.arange(3, 33).view(2, 15))
    finally:
        del layer.body.forward
    assert sum(sizes) == layer.counter.rows == layer.counter.units_live < 30
    x = torch.zeros(1, 2, 32)
    none = layer(torch.zeros(1, 2, 1), x, *_others(layer, x))
    assert torch.equal(none[0] if layer.slots else none, x) and layer.counter.rows == sum(sizes)


def _others(layer: RoutedLayer, x: Tensor) -> list[Tensor]:
    """Inputs that nothing may read when no token is live, cache entries of no length."""
    slots = {at for at, _ in (*layer.slots, *([layer.keys] if layer.keys else []))}
    return [
        torch.zeros(1, 2, 0, 8) if number in slots else torch.full((1,), torch.nan)
        for number in range(1, len(layer.axes))
    ]


@given(st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_expert_choice_meets_its_budget(tokens: int, active: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = DepthRouter(torch.randn(1, 6, generator=generator), rule="top-k", active=active)
    x = torch.randn(2, tokens, 6, generator=generator)
    live = router(x).detach()[..., 0] != 0
    assert (live.sum(1) == int(active * tokens + 0.5)).all()
    for row, scores in zip(live, router.scores(x)[..., 0], strict=True):
        if row.any() and not row.all():
            assert scores[row].min() >= scores[~row].max()


def test_calibrated_budget_holds() -> None:
    ids = torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(7))
    model: Any = sparsify.compile(
        captured("llama"), "depth-mod", calibration=[ids], reproducer=None
    )
    assert all(m.errors is not None for m in model.modules() if isinstance(m, Budgeted))
    model.set_active(0.5)
    model.reset_counters()
    with torch.no_grad():
        model(input_ids=ids)
    live = list(model.realised().values())
    assert abs(sum(live) / len(live) - 0.5) < 0.1


def test_blocks_that_every_token_runs_and_regions_inside() -> None:
    model = sparsify.compile(captured("llama"), "depth-mod{first=1},ffn-moe", reproducer=None)
    one, two = model.report.steps
    assert [r.kind for r in one.remarks] == ["left", "applied"]
    assert [r.kind for r in two.remarks] == ["applied", "left"]
    assert "lies inside model.layers.1" in two.remarks[1].reason


def test_routed_modules_move_into_the_layer() -> None:
    model: Any = sparsify.compile(captured("llama"), "ffn-moe,depth-mod", reproducer=None)
    first, second = model.report.steps
    assert second.count("applied") == 2
    found = dense_weights(model, first.weights)
    dense = dict(captured("llama").graph.named_parameters())
    assert found and all(torch.equal(t, dense[name]) for name, t in found.items())
