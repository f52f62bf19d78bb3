"""attn-moba: selected blocks against loops; causality, cache, grids, counters, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsify
from sparsify.errors import BadInput, BadOption
from sparsify.runtime.block_attend import BlockAttend
from sparsify.runtime.key_blocks import members, select, tile_of_layer
from sparsify.runtime.prefix import Prefix
from tests.contract.zoo_captures import captured
from tests.unit.test_moa import SOFTCAPPED, causal_mask, tensors

SELECTIONS = ("top-k", "global", "threshold")


def module(active: float = 0.5, selection: str = "top-k", **changed: Any) -> BlockAttend:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 5, "causal": False}
    options: dict[str, Any] = {**sizes, "block": 3, **changed}
    budget = Prefix(64, active=active)
    return BlockAttend(SOFTCAPPED, selection=selection, budget=budget, **options)


def kept_blocks(
    layer: BlockAttend, q: Tensor, k: Tensor, mask: Tensor, block_of: list[int]
) -> set[tuple[int, int]]:
    """(query, block) pairs of one head, by loops: q (T, d), k (S, d), mask (T, S)."""
    tokens, keys, active = len(q), len(k), layer.budget.active
    free = mask > -1e4
    causal = not any(free[t, s] for t in range(tokens) for s in range(t + keys - tokens + 1, keys))
    used = [causal or bool(free[:, s].any()) for s in range(keys)]
    own, pairs, scores = [], [], {}
    for t in range(tokens):
        place = t + keys - tokens
        last = [s for s in range(keys) if free[t, s]]
        own.append((t, block_of[last[-1] if causal and last else place]))
        for n in sorted({block_of[s] for s in last} | {own[-1][1]}):
            mine = [k[s] for s in range(keys) if block_of[s] == n and used[s]]
            scores[t, n] = float(q[t] @ torch.stack(mine).mean(0)) if mine else 0.0
            if causal or used[place]:
                pairs.append((t, n))
    if active >= 1:
        return set(scores)
    found = set(own)
    together = not causal and layer.selection != "top-k"
    for pool in [pairs] if together else [[p for p in pairs if p[0] == t] for t in range(tokens)]:
        ranked = sorted((p for p in pool if p not in own), key=lambda p: -scores[p])
        first = [p for p in pool if p in own]
        if layer.selection != "threshold":
            found |= set((first + ranked)[: math.ceil(active * len(pool) - 1e-9)])
            continue
        counted = ranked if causal else pool
        values = [scores[p] for p in counted]
        low, high = min(values, default=0.0), max(values, default=0.0)
        weight = {p: (scores[p] - low) / (high - low) if high > low else 1.0 for p in counted}
        held = 0.0 if causal else sum(weight[p] for p in first)
        for p in ranked:
            if held < active * sum(weight.values()) - 1e-9:
                found.add(p)
            held += weight[p]
    return found


def reference(layer: BlockAttend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Whole matrices, one head at a time, with what the loops kept."""
    block_of = members(k.shape[2], layer.block, layer.grid, layer.tile).tolist()
    found = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(layer.heads):
            g = h // (layer.heads // layer.kv_heads)
            kept = kept_blocks(layer, q[b, h], k[b, g], mask[b, 0], block_of)
            scores = torch.tanh(0.4 * (q[b, h] @ k[b, g].T)) + mask[b, 0]
            for t in range(q.shape[2]):
                dead = [s for s, n in enumerate(block_of) if (t, n) not in kept]
                scores[t, dead] = -math.inf
            found[b, h] = scores.softmax(-1) @ v[b, g]
    return found


def padded(tokens: int, keys: int) -> Tensor:
    """Nothing is hidden by order; the second row has two keys less."""
    mask = torch.zeros(2, 1, tokens, keys, dtype=torch.float64)
    mask[1, ..., -2:] = -1e30
    return mask


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("active", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 10), (11, 11), (4, 12)])
def test_selected_blocks_are_a_mask(tokens: int, keys: int, active: float, selection: str) -> None:
    layer, (q, k, v) = module(active, selection), tensors(tokens, keys)
    layer.dispatch = "grouped"
    for mask in (causal_mask(tokens, keys), padded(tokens, keys)):
        found, wanted = layer(q, k, v, mask), reference(layer, q, k, v, mask)
        live = (mask > -1e4).any(-1).expand(-1, 4, -1)
        torch.testing.assert_close(found[live], wanted[live])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("tile", [(1, 2, 2), (2, 2, 2), (2, 1, 2)])
def test_grids(selection: str, tile: tuple[int, ...]) -> None:
    layer = module(0.4, selection, grid=(2, 2, 2), tile=tile)
    q, k, v = tensors(10, 10)  # two further keys come first
    mask = torch.zeros(2, 1, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(q, k, v, mask), reference(layer, q, k, v, mask))
    with pytest.raises(BadInput, match="causal mask"):
        layer(q, k, v, causal_mask(10, 10))
    with pytest.raises(BadInput, match="7 keys do not fill"):
        layer(*tensors(7, 7), mask[..., :7, :7])


def test_partitions_take_turns() -> None:
    tiles = [tile_of_layer((4, 8, 6), (2, 4, 5), layer) for layer in range(4)]
    assert tiles == [(2, 8, 6), (4, 4, 5), (2, 4, 5), (2, 8, 6)]
    assert [tile_of_layer((8, 8), (2, 4), n) for n in range(2)] == [(2, 8), (2, 4)]
    time, space, both = (members(4 * 8 * 6, 1, (4, 8, 6), t).view(4, 8, 6) for t in tiles[:3])
    assert torch.equal(time, (torch.arange(4) // 2).view(4, 1, 1).expand(4, 8, 6))
    assert torch.equal(space[0], space[3]) and space.unique().numel() == 2 * 2
    assert space[0, 3].tolist() == [0, 0, 0, 0, 0, 1] and int(space[0, 4, 0]) == 2
    assert both.unique().tolist() == list(range(8)) and int(both[2, 0, 5]) == 5
    assert members(5, 1, (2, 2), (1, 2)).tolist() == [0, 1, 1, 2, 2]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    at=st.integers(1, 11),
    active=st.floats(0.05, 1),
    selection=st.sampled_from(SELECTIONS),
    by_flag=st.booleans(),
)
def test_later_tokens_change_nothing(
    seed: int, at: int, active: float, selection: str, by_flag: bool
) -> None:
    layer = module(active, selection, causal=by_flag)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, 12, 6), (1, 2, 12, 6), (1, 2, 12, 5))
    before = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    after = [t.clone() for t in before]
    for t in after:
        t[:, :, at:] = 3 * torch.randn(t[:, :, at:].shape, generator=generator, dtype=t.dtype)
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    if not by_flag:
        mask += torch.full((12, 12), -1e30, dtype=torch.float64).triu(1)
    a, b = (layer(*x, mask)[:, :, :at] for x in (before, after))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("window", [100, 5])
def test_decoding_is_prefill(selection: str, window: int) -> None:
    layer, (q, k, v) = module(0.4, selection), tensors(14, 14)
    mask = causal_mask(14, 14)
    mask = mask + torch.full((14, 14), -1e30, dtype=torch.float64).tril(-window)
    whole = layer(q, k, v, mask)
    chunks = [(0, 4), (4, 5), (5, 8), *((t, t + 1) for t in range(8, 14))]
    parts = [layer(q[:, :, a:b], k[:, :, :b], v[:, :, :b], mask[:, :, a:b, :b]) for a, b in chunks]
    live = (mask > -1e4).any(-1).expand(-1, 4, -1)
    torch.testing.assert_close(torch.cat(parts, 2)[live], whole[live])


def test_gradcheck() -> None:
    layer = module(0.4)
    inputs = [t[:1, :, :, :3].clone().requires_grad_() for t in tensors(3, 7)]
    mask = torch.full((3, 7), -1e30, dtype=torch.float64).triu(5).expand(1, 1, 3, 7)
    assert torch.autograd.gradcheck(lambda q, k, v: layer(q, k, v, mask), inputs)


def test_dead_blocks_are_not_multiplied() -> None:
    layer, (q, k, v) = module(0.3, block=10), tensors(60, 60)
    mask = torch.zeros(2, 1, 60, 60, dtype=torch.float64)
    layer(q, k, v, mask)
    counter = layer.counter
    assert counter.rows == counter.units_live == 2 * 4 * 60 * 2 * 10  # ceil(0.3 * 6) blocks
    assert counter.units_total == counter.rows_dense == 2 * 4 * 60 * 60
    counter.reset()
    v[:, :, :40] = math.nan  # decoding: what is not selected is not read
    k[:, :, 40:50] *= 0
    q, k = q.abs(), k.abs()
    k[:, :, :40] = -1
    out = layer(q[:, :, -1:], k, v, mask[:, :, -1:])
    assert counter.rows == 2 * 4 * 2 * 10 and bool(out.isfinite().all())
    assert layer.cost(context=60).flops == 2 * 4 * (20 * (6 + 5) + 6 * 6)
    assert layer.cost(1.0, 60).flops == 2 * 4 * 60 * (6 + 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), active=st.floats(0.05, 1), together=st.booleans())
def test_budgets_are_met(seed: int, active: float, together: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 2, 6, 5, generator=generator)
    visible = torch.rand(2, 2, 6, 5, generator=generator) < 0.7
    own = torch.zeros_like(visible)
    own[..., torch.arange(6), torch.randint(5, (6,), generator=generator)] = True
    visible |= own
    for selection in SELECTIONS:
        live = select(scores, visible, own, active, selection, together=together)
        assert bool((live & own).sum() == own.sum()) and not bool((live & ~visible).any())
        pooled = together and selection != "top-k"
        dims = (2, 3) if pooled else (3,)
        counts, seen, mine = (x.sum(dims) for x in (live, visible, own))
        most = (seen.double() * active - 1e-9).ceil()
        if selection == "threshold":
            assert bool((counts <= most + mine).all())
        else:
            assert torch.equal(counts.double(), most.maximum(mine.double()))
        order = torch.randperm(5, generator=generator)
        moved = [x[..., order] for x in (scores, visible, own)]
        again = select(moved[0], moved[1], moved[2], active, selection, together=together)
        assert torch.equal(again, live[..., order])


def slow(layer: BlockAttend) -> Any:
    """The module's forward by loops."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.where(mask, 0.0, -1e30) if mask.dtype == torch.bool else mask
        block_of = members(k.shape[2], layer.block).tolist()
        repeat = layer.heads // layer.kv_heads
        scores = layer.before(q @ k.repeat_interleave(repeat, 1).transpose(2, 3), mask)
        for b in range(q.shape[0]):
            for h in range(layer.heads):
                kept = kept_blocks(layer, q[b, h], k[b, h // repeat], hidden[b, 0], block_of)
                for t in range(q.shape[2]):
                    dead = [s for s, n in enumerate(block_of) if (t, n) not in kept]
                    scores[b, h, t, dead] = -math.inf
        return layer.after(scores) @ v.repeat_interleave(repeat, 1)

    return forward


@pytest.mark.parametrize(("name", "selection"), [("llama", "top-k"), ("gemma2", "threshold")])
@torch.no_grad()
def test_generation(name: str, selection: str) -> None:
    cap = captured(name)
    text = f"attn-moba{{block=2 selection={selection}}}"
    model = sparsify.compile(cap, text, reproducer=None)
    layers = [m for m in model.modules() if isinstance(m, BlockAttend)]
    model.set_active(0.4)
    ids = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    found = model.generate(ids, **options)
    routed = model(input_ids=ids, attention_mask=mask).logits
    assert (routed - cap.source(input_ids=ids, attention_mask=mask).logits).abs().max() > 1e-3
    whole = model(input_ids=found[:1], attention_mask=torch.ones_like(found[:1])).logits
    assert torch.equal(whole[0, 10:-1].argmax(-1), found[0, 11:])  # token by token = in one call
    for layer in layers:
        layer.forward = slow(layer)
    again = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(routed[:, -1], again[:, -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(found, model.generate(ids, **options))


def test_layers_take_turns_on_a_grid() -> None:
    model = sparsify.compile(captured("vit"), "attn-moba{grid=4x4 tile=2x2}", reproducer=None)
    layers = [m for m in model.modules() if isinstance(m, BlockAttend)]
    assert [m.tile for m in layers[:2]] == [(2, 4), (2, 2)] and layers[0].grid == (4, 4)
    model.set_active(0.5)
    model.reset_counters()
    model.graph(*model.example)
    assert all(0.3 < m.counter.units_live / m.counter.units_total < 0.75 for m in layers)


def test_what_cannot_be() -> None:
    for name, grid, why in (("llama", "2x4", "causal"), ("vit", "9x9", "17 keys")):
        text = f"attn-moba{{grid={grid} tile=1x2}}"
        model = sparsify.compile(captured(name), text, reproducer=None)
        remarks = model.report.steps[0].remarks
        assert remarks and all(r.kind == "left" and why in r.reason for r in remarks)
    for options, why in (
        ("grid=4x4", "a tile with as many"),
        ("grid=ax2 tile=2x2", "cannot be 'ax2'"),
    ):
        with pytest.raises(BadOption, match=why):
            sparsify.compile(captured("vit"), f"attn-moba{{{options}}}", reproducer=None)
