"""attn-mla: keys and values through a latent; ranks, calibration, decoding with the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.evidence import dense_limit
from sparsify.runtime.latent import LatentProjection
from sparsify.runtime.prefix import Prefix
from tests.contract.zoo_captures import captured, tokens_of


def compiled(name: str, calibrated: bool = False) -> Any:
    cap = captured(name)
    calibration = tokens_of(cap, name) if calibrated else None
    return sparsify.compile(cap, "attn-mla", calibration=calibration, reproducer=None)


def latents(model: Any) -> list[LatentProjection]:
    return [m for m in model.modules() if isinstance(m, LatentProjection)]


@pytest.mark.parametrize(("name", "fused"), [("llama", False), ("gpt2", True), ("phi3", True)])
def test_where_keys_and_values_come_from_one_projection_queries_stay(
    name: str, fused: bool
) -> None:
    layers = latents(compiled(name))
    assert len(layers) == 2
    for layer in layers:
        assert (layer.others is not None) == fused
        identity = layer.up.T @ layer.up
        torch.testing.assert_close(identity, torch.eye(len(identity)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_lower_rank_is_the_best_approximation_and_really_computed_narrower() -> None:
    model = compiled("llama")
    dense = dict(captured("llama").graph.named_parameters())
    names = [f"model.layers.0.self_attn.{name}.weight" for name in ("k_proj", "v_proj")]
    weight = torch.cat([dense[name] for name in names]).double()
    model.set_active(0.5)
    layer = latents(model)[0]
    rank = layer.rank.count
    assert rank == len(layer.down) // 2
    found = (layer.up[:, :rank].double() @ layer.down[:rank].double() - weight).square().sum()
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found, values[rank:].square().sum(), rtol=1e-4, atol=1e-6)
    model.reset_counters()
    model(input_ids=torch.arange(3, 9).view(1, 6))
    assert layer.counter.rows == layer.counter.units_live == 6 * rank


@torch.no_grad()
def test_calibration_lowers_the_error_on_the_data_and_spreads_the_budget() -> None:
    ids = torch.cat(tokens_of(captured("llama"), "llama"))
    dense = captured("llama")
    with torch.no_grad():
        errors = []
        for calibrated in (False, True):
            model = compiled("llama", calibrated)
            full = model(input_ids=ids).logits
            assert all((m.errors is not None) == calibrated for m in model.modules()
                       if isinstance(m, Prefix))  # fmt: skip
            model.set_active(0.6)
            errors.append(float((model(input_ids=ids).logits - full).square().mean()))
            model.set_active(1.0)
    assert dense.kind == "causal-lm" and errors[1] < errors[0]


@torch.no_grad()
def test_decoding_with_the_cache_is_decoding_without() -> None:
    model = compiled("llama")
    model.set_active(0.5)
    ids = torch.tensor([[5, 9, 70, 11]])
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    slow = ids
    for _ in range(6):
        slow = torch.cat([slow, model(input_ids=slow).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, slow[:, : found.shape[1]])


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    layer = LatentProjection(
        draw(5, 4), draw(4, 6), draw(3, 6), draw(8), rank=Prefix(4, active=0.5),
        pieces={"a": (0, 8)}, places=torch.tensor([0, 2, 4, 6, 7, 1, 3, 5]),
    )  # fmt: skip
    assert layer.rank.count == 2

    def run(x: Tensor, up: Tensor, down: Tensor, others: Tensor) -> Tensor:
        weights = {"up": up, "down": down, "others": others}
        return torch.func.functional_call(layer, weights, (x,))

    assert torch.autograd.gradcheck(run, (draw(2, 6), layer.up, layer.down, layer.others))


def test_half_types_and_rewritten_parts_are_refused() -> None:
    half = copy.deepcopy(compiled("llama")).to(torch.bfloat16)
    with torch.no_grad(), dense_limit(half):
        assert half(input_ids=torch.tensor([[4, 8]])).logits.isfinite().all()
    model = sparsify.compile(
        captured("llama"), "attn-mot{tokens=9-20 at=*.k_proj},attn-mla", reproducer=None
    )
    remarks = model.report.steps[1].remarks
    assert all(r.kind == "left" and "attn-mot" in r.reason for r in remarks)
