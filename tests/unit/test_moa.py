"""attn-moa: spans per head against a slow masked reference; cache, padding, profile, counters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.passes._spans import ranked
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.spans import SpanAttend
from tests.contract.zoo_captures import captured, tokens_of

SOFTCAPPED = Program(
    ("scores", "op0"),
    (
        Step("a", "aten.mul.Tensor", (Ref("scores"), 0.4)),
        Step("b", "aten.tanh.default", (Ref("a"),)),
        Step("c", "aten.add.Tensor", (Ref("b"), Ref("op0"))),
        Step("d", "aten._softmax.default", (Ref("c"), -1, False)),
    ),
    "d",
)


def module(active: float = 0.5, **changed: Any) -> SpanAttend:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 5, "causal": False}
    options: dict[str, Any] = {**sizes, "alpha": 2, "sinks": 1, "steps": 4, **changed}
    budget = Prefix(options["heads"] * options["steps"])
    made = SpanAttend(SOFTCAPPED, budget=budget, **options)
    made.order = torch.tensor([0, 0, 1, 2, 0, 0, 1, 3, 3, 2, 2, 1, 1, 2, 3, 3])
    budget.set_active(active)
    return made


def tensors(tokens: int, keys: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(2, 4, tokens, 6), draw(2, 2, keys, 6), draw(2, 2, keys, 5)


def causal_mask(tokens: int, keys: int) -> Tensor:
    mask = torch.full((tokens, keys), -1e30, dtype=torch.float64).triu(keys - tokens + 1)
    mask = mask.expand(2, 1, tokens, keys).clone()
    mask[1, :, :, :2] = -1e30  # the second row is padded on the left
    return mask


def reference(layer: SpanAttend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Whole matrices, one head at a time."""
    tokens, keys = q.shape[2], k.shape[2]
    found = []
    for head, span in enumerate(layer.spans(keys)):
        group = head // 2
        scores = torch.tanh(0.4 * (q[:, head] @ k[:, group].transpose(1, 2))) + mask[:, 0]
        for t in range(tokens):
            p = t + keys - tokens
            for j in range(keys):
                if abs(p - j) >= span and j >= layer.sinks:
                    scores[:, t, j] = -math.inf
        found.append(scores.softmax(-1) @ v[:, group])
    return torch.stack(found, 1)


@pytest.mark.parametrize("active", [0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 9), (9, 9), (3, 12), (70, 70), (5, 80)])
def test_spans_are_a_mask(tokens: int, keys: int, active: float) -> None:
    layer, (q, k, v) = module(active), tensors(tokens, keys)
    for mask in (causal_mask(tokens, keys), torch.zeros(2, 1, tokens, keys).double()):
        found, wanted = layer(q, k, v, mask), reference(layer, q, k, v, mask)
        seen = ~(mask[..., 0, :] <= -1e4).all(-1)  # rows with a key that is not masked
        live = (mask > -1e4).any(-1).expand(-1, 4, -1)
        torch.testing.assert_close(found[live], wanted[live])
        assert bool(seen.any())


def test_keys_beyond_spans_are_not_multiplied() -> None:
    layer, (q, k, v) = module(0.3), tensors(300, 300)
    layer(q, k, v, causal_mask(300, 300))
    spans = layer.spans(300)
    within = sum(min(t + 1, s) + max(0, min(1, t + 1 - s)) for s in spans for t in range(300)) * 2
    assert layer.counter.units_live == within
    assert layer.counter.rows_dense == 2 * 4 * 300 * 300
    assert within <= layer.counter.rows < 0.5 * layer.counter.rows_dense
    layer.counter.reset()
    layer(*tensors(1, 300), causal_mask(1, 300))  # decoding: exactly the keys within
    assert layer.counter.rows == layer.counter.units_live == 2 * sum(min(s + 1, 300) for s in spans)


def test_gradcheck() -> None:
    layer = module(0.4)
    inputs = [t.requires_grad_() for t in tensors(5, 7)]
    mask = torch.full((5, 7), -1e30, dtype=torch.float64).triu(3).expand(2, 1, 5, 7)
    assert torch.autograd.gradcheck(lambda q, k, v: layer(q, k, v, mask), inputs)


def test_units_go_where_they_keep_most() -> None:
    kept = torch.tensor([[0.2, 0.3, 0.9, 1.0], [0.8, 0.95, 1.0, 1.0]])
    order, gains = ranked(kept)
    assert order.tolist() == [0, 0, 1, 0, 1, 1]  # the first step of head 0 pays with its second
    torch.testing.assert_close(gains.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert bool((gains.diff() <= 1e-12).all())


def slow(layer: SpanAttend) -> Any:
    """The module's forward on whole matrices, all pairs multiplied and then masked."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        tokens, keys = q.shape[2], k.shape[2]
        k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, dim=1) for t in (k, v))
        scores = layer.before(q @ k.transpose(2, 3), *operands)
        distance = torch.arange(keys - tokens, keys).unsqueeze(1) - torch.arange(keys)
        for head, span in enumerate(layer.spans(keys)):
            beyond = (distance.abs() >= span) & (torch.arange(keys) >= layer.sinks)
            scores[:, head] = scores[:, head].masked_fill(beyond, -math.inf)
        return layer.after(scores) @ v

    return forward


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_calibrated_spans_and_generation(name: str) -> None:
    cap = captured(name)
    text = "attn-moa{alpha=1 sinks=1}"
    model = sparsify.compile(cap, text, calibration=tokens_of(cap, name), reproducer=None)
    layers = [m for m in model.modules() if isinstance(m, SpanAttend)]
    assert all(m.budget.errors is not None for m in layers)
    model.set_active(0.4)
    assert any(len(set(m.spans(64))) > 1 for m in layers)
    assert sum(m.budget.active for m in layers) / len(layers) == pytest.approx(0.4, abs=0.01)
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0  # padded on the left
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    found = model.generate(ids, **options)
    routed = model(input_ids=ids, attention_mask=mask).logits
    assert (routed - cap.source(input_ids=ids, attention_mask=mask).logits).abs().max() > 1e-3
    for layer in layers:
        layer.forward = slow(layer)
    torch.testing.assert_close(
        routed[:, -1], model(input_ids=ids, attention_mask=mask).logits[:, -1], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(found, model.generate(ids, **options))
