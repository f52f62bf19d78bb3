"""Recursion depth: budgets, nesting, both cache rules against slow references, tied layers."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsify
from sparsify.capture import capture
from sparsify.core import Refused
from sparsify.passes._sharing import groups, runs
from sparsify.runtime.depth import RoutedLayer
from sparsify.runtime.generate import generate
from sparsify.runtime.prefix import Prefix
from sparsify.runtime.recursion import DepthChoice, RecursionRouter, step_shares
from sparsify.runtime.tied import TiedLinear
from tests.contract.zoo_captures import captured

LAYERS = 6


@functools.cache
def deep_llama() -> tuple[Any, Any]:
    """A random llama of six layers, and its capture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    return model, capture(model)


def routed(options: str) -> Any:
    return sparsify.compile(deep_llama()[1], f"depth-mor{{{options}}}", reproducer=None)


# ------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("sharing", "tied"),
    [
        ("cycle", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("sequence", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("middle-cycle", [(1, 4), (2, 5), (3, 6)]),
        ("middle-sequence", [(1, 2), (3, 4), (5, 6)]),
    ],
)
def test_sharing_schemes(sharing: str, tied: list[tuple[int, int]]) -> None:
    """As table 1 of the paper writes them for eight layers and two recursions."""
    assert sorted(groups(8, sharing, 2)) == tied


def test_layers_that_cannot_be_divided() -> None:
    with pytest.raises(Refused, match="8 layers cannot be divided into 3") as refused:
        runs(8, "cycle", 3)
    assert refused.value.suggestion == "recursions=2 or 4 or 8"


@given(st.integers(2, 7), st.floats(0.02, 1.0))
@settings(max_examples=60, deadline=None)
def test_shares_fall_and_meet_the_budget(steps: int, active: float) -> None:
    shares = step_shares(steps, active)
    assert len(shares) == steps - 1
    assert sum(shares) / len(shares) == pytest.approx(active, abs=1e-6)
    assert all(1 >= a >= b >= 0 for a, b in itertools.pairwise(shares))


def test_half_is_the_papers_schedule() -> None:
    assert step_shares(3, 0.5) == pytest.approx((2 / 3, 1 / 3))
    assert step_shares(4, 0.5) == pytest.approx((3 / 4, 2 / 4, 1 / 4))


# ------------------------------------------------------------------------------ routers


@given(st.integers(1, 12), st.floats(0.05, 1.0), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_expert_choice_is_nested_and_meets_its_capacity(
    tokens: int, active: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = None
    for step, share in enumerate(step_shares(4, active), 2):
        x = torch.randn(2, tokens, 5, generator=generator)
        weight = torch.randn(1, 5, generator=generator)
        router = RecursionRouter(weight, step=step, steps=4, rule="top-k", active=active)
        live = router(x, before).detach()
        assert (live.sum(1) == int(share * tokens + 0.5)).all()
        if before is not None:
            assert not (live.bool() & ~before.bool()).any()
        order = torch.randperm(tokens, generator=generator)
        moved = router(x[:, order], None if before is None else before[:, order])
        assert torch.equal(moved, live[:, order])  # whoever comes first has no advantage
        before = live


def test_token_choice_meets_its_shares() -> None:
    x = torch.randn(4, 500, 8, generator=torch.Generator().manual_seed(0))
    router = DepthChoice(torch.randn(1, 8, generator=torch.Generator().manual_seed(1)), steps=4)
    router.calibrate(x)
    router.set_active(0.4)
    live = router(x).detach()
    assert live.flatten(0, 1).mean(0).tolist() == pytest.approx(step_shares(4, 0.4), abs=0.005)
    assert (live[..., 1:] <= live[..., :-1]).all()
    assert router.live_share(1) == step_shares(4, 0.4)[1]


# ------------------------------------------------------------------------------ references


def reference(model: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Logits (B, T, V) by masks, without a cache: every layer runs every token."""
    dense = deep_llama()[0]
    steps = runs(LAYERS, options["sharing"], options["recursions"])
    shared, token = options["kv"] == "shared", options["choice"] == "token"
    batch, tokens = ids.shape
    x = dense.model.embed_tokens(ids)
    rotary = dense.model.rotary_emb(x, torch.arange(tokens)[None])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    everyone = torch.ones(batch, tokens, dtype=torch.bool)
    live_at = {index: (everyone, index) for index in range(LAYERS)}
    opened = {}
    for number, run in enumerate(steps):
        for step, layers in enumerate(run[1:], 2):
            opened[layers[0]] = f"model.layers.router_{number}_{2 if token else step}", step
            for place, index in enumerate(layers):
                live_at[index] = (everyone, run[0][place])
    live = everyone
    chosen = everyone[..., None]
    entries: dict[int, Tensor] = {}
    inside = {index for run in steps for layers in run[1:] for index in layers}
    for index, layer in enumerate(dense.model.layers):
        if index in opened:
            router = model.get_submodule(opened[index][0])
            step = opened[index][1]
            if token and step > 2:
                live = chosen[..., step - 2]
            elif token:
                chosen = router.scores(x) > torch.tensor(router.thresholds())
                live = chosen[..., 0]
            else:
                live = (router.scores(x)[..., 0] > router.threshold) & (live | (step == 2))
        here = live if index in inside else everyone
        entries[index] = x
        seen = causal.expand(batch, -1, -1)
        if shared and index in inside:
            out = _attend_elsewhere(dense, x, index, live_at[index][1], entries, rotary, seen)
        else:
            if options["kv"] == "recursion":
                seen = seen & here[:, None] | torch.eye(tokens, dtype=torch.bool)
            bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
            out = layer(x, attention_mask=bias, position_embeddings=rotary)
            out = out[0] if isinstance(out, tuple) else out
        x = torch.where(here[..., None], out, x)
    logits: Tensor = dense.lm_head(dense.model.norm(x))
    return logits


def _attend_elsewhere(
    dense: Any, x: Tensor, index: int, source: int, entries: Any, rotary: Any, seen: Tensor
) -> Tensor:
    """One layer whose keys and values are those of layer ``source``."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer, other = dense.model.layers[index], dense.model.layers[source]
    heads = lambda t: t.unflatten(-1, (-1, 8)).transpose(1, 2)  # noqa: E731
    own = layer.input_layernorm(x)
    theirs = other.input_layernorm(entries[source])
    q = heads(layer.self_attn.q_proj(own))
    k, v = heads(other.self_attn.k_proj(theirs)), heads(other.self_attn.v_proj(theirs))
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~seen[:, None], -torch.inf)
    mixed = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    x = x + layer.self_attn.o_proj(mixed)
    result: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return result


CASES = {
    "expert": {"recursions": 3, "sharing": "cycle", "choice": "expert", "kv": "recursion"},
    "token": {"recursions": 3, "sharing": "cycle", "choice": "token", "kv": "recursion"},
    "middle": {"recursions": 2, "sharing": "middle-cycle", "choice": "expert", "kv": "recursion"},
    "sequence": {"recursions": 2, "sharing": "sequence", "choice": "token", "kv": "recursion"},
    "expert-all": {"recursions": 3, "sharing": "cycle", "choice": "expert", "kv": "all"},
    "expert-shared": {"recursions": 3, "sharing": "cycle", "choice": "expert", "kv": "shared"},
    "token-shared": {"recursions": 2, "sharing": "sequence", "choice": "token", "kv": "shared"},
}


@functools.cache
def case(name: str) -> Any:
    options = ",".join(f"{k}={v}" for k, v in CASES[name].items())
    model = routed(options)
    model.set_active(0.6)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_forward_and_generation_equal_the_reference(name: str) -> None:
    model, options = case(name), CASES[name]
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    model.reset_counters()
    found = model(input_ids=ids).logits
    shares = list(model.realised().values())
    assert any(0 < share < 1 for share in shares)
    torch.testing.assert_close(found, reference(model, ids, options), rtol=1e-4, atol=1e-5)
    wanted = ids
    for _ in range(8):
        token = reference(model, wanted, options)[:, -1].argmax(-1)
        wanted = torch.cat([wanted, token[:, None]], 1)
    assert torch.equal(generate(model, ids, max_new_tokens=8), wanted)
    hf = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(hf, wanted)


@torch.no_grad()
def test_work_is_skipped_and_nested() -> None:
    model = case("expert")
    model.reset_counters()
    model(input_ids=torch.arange(3, 43).view(2, 20))
    layers = [m for m in model.modules() if isinstance(m, RoutedLayer)]
    rows = [layer.counter.rows for layer in layers]
    assert [layer.counter.units_live for layer in layers] == rows
    assert rows[0] == rows[1] >= rows[2] == rows[3] and rows[3] < 40


@torch.no_grad()
def test_shared_entries_are_one_tensor() -> None:
    """The cache of later steps is the first step's storage: it costs no memory."""
    model = case("expert-shared")
    cache = model(input_ids=torch.arange(3, 13)[None], use_cache=True).past_key_values
    first, later = cache.layers[0].keys, cache.layers[2].keys
    assert later.data_ptr() == first.data_ptr()


def test_calibrated_budget_holds_in_every_step() -> None:
    ids = torch.randint(3, 60, (8, 32), generator=torch.Generator().manual_seed(7))
    for choice in ("expert", "token"):
        model: Any = sparsify.compile(
            deep_llama()[1],
            f"depth-mor{{recursions=3,choice={choice}}}",
            calibration=[ids],
            reproducer=None,
        )
        model.set_active(0.5)
        model.reset_counters()
        with torch.no_grad():
            model(input_ids=ids)
        live = list(model.realised().values())
        assert live == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3], abs=0.05)


def test_refusals_say_why() -> None:
    model = sparsify.compile(captured("vit"), "ffn-moe,depth-mor{kv=shared}", reproducer=None)
    (remark,) = model.report.steps[1].remarks
    assert "nothing to share" in remark.reason and remark.suggestion == "kv=recursion"
    model = sparsify.compile(deep_llama()[1], "ffn-moe,depth-mor{recursions=4}", reproducer=None)
    (remark,) = model.report.steps[1].remarks
    assert remark.suggestion == "recursions=2 or 3 or 6"


# ------------------------------------------------------------------------------ layers-tie


def test_tied_layers_are_one_parameter(tmp_path: Any) -> None:
    options = "recursions=3,rank=0.25"
    model: Any = sparsify.compile(
        deep_llama()[1], f"layers-tie{{{options}}},depth-mor{{recursions=3}}", reproducer=None
    )
    tied = [m for m in model.modules() if type(m).__name__ == "TiedLinear"]
    assert len({id(m.shared) for m in tied}) == len(tied) // 3
    dense = sum(p.numel() for p in deep_llama()[0].parameters())
    assert sum(p.numel() for p in model.parameters()) < dense
    assert {r.reason.split(",")[1].split(" (")[0] for r in model.report.steps[0].remarks} >= {
        " rank 4 of 16"
    }
    model.save(tmp_path / "out")
    again: Any = sparsify.load(tmp_path / "out")
    tied = [m for m in again.modules() if type(m).__name__ == "TiedLinear"]
    assert len({id(m.shared) for m in tied}) == len(tied) // 3
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_tied_projection_is_mean_plus_best_residual() -> None:
    model: Any = sparsify.compile(deep_llama()[1], "layers-tie{recursions=2}", reproducer=None)
    dense = deep_llama()[0].model.layers
    module = model.get_submodule("model.layers.1.mlp.down_proj.tied")
    weights = [dense[at].mlp.down_proj.weight.detach() for at in (1, 4)]
    torch.testing.assert_close(module.shared.detach(), sum(weights) / 2)
    rest = weights[0] - sum(weights) / 2
    module.rank.set_active(0.5)
    u, s, v = torch.linalg.svd(rest)
    best = u[:, :8] * s[:8] @ v[:8]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(x), x @ (sum(weights) / 2 + best).T, rtol=1e-4, atol=1e-5)
        module.counter.reset()
        module(x)
    assert module.counter.rows == 3 * 8 and module.counter.units_live == 3 * 8
    assert module.cost(0.5).flops == 2 * (16 * 32 + 8 * (16 + 32))


# ------------------------------------------------------------------------------ gradients


def test_gradcheck_of_a_tied_projection() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    shared, up, down, bias, x = drawn(5, 4), drawn(3, 5), drawn(3, 4), drawn(5), drawn(2, 4)
    rank = Prefix(3, active=0.67)

    def run(*parts: Tensor) -> Tensor:
        module = TiedLinear(*parts[:4], rank=rank)
        named = dict(zip(("shared", "up", "down", "bias"), parts[:4], strict=True))
        return torch.func.functional_call(module, named, (parts[4],))

    assert rank.count == 2
    assert torch.autograd.gradcheck(run, (shared, up, down, bias, x))


@pytest.mark.parametrize("name", ["expert", "expert-all", "expert-shared"])
def test_gradcheck_of_a_routed_layer(name: str) -> None:
    """Of the stream and of who is live; gathering and putting back is exact to first order."""
    options = ",".join(f"{k}={v}" for k, v in CASES[name].items())
    model: Any = sparsify.compile(
        deep_llama()[1], f"depth-mor{{{options}}}", share=False, reproducer=None
    )
    model = model.double()
    layer = next(m for m in model.modules() if isinstance(m, RoutedLayer))
    seen: list[tuple[Tensor, ...]] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 8)[None])
    handle.remove()
    _, x, *others = seen[0]
    select = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64).view(1, 5, 1)
    live = select[select != 0].clone().requires_grad_()

    def run(x: Tensor, live: Tensor) -> Tensor:
        weight = torch.zeros_like(select).masked_scatter(select != 0, live)
        y = layer(weight, x, *others)
        return y if isinstance(y, Tensor) else y[0]

    assert torch.autograd.gradcheck(run, (x.detach().requires_grad_(), live))
