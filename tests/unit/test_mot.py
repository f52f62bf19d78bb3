"""ffn-mot and attn-mot on a toy of two modalities: text and image tokens in one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.errors import BadInput
from sparsify.evidence import dense_limit, error_between
from sparsify.runtime.modality import ModalityFFN, ModalityLinear, ModalityModule
from sparsify.runtime.program import Program, Ref, Step
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import LIMITS, captured

BY_IDS = "ffn-mot{ids=kind},attn-mot{ids=kind}"
BY_TOKENS = "ffn-mot{tokens=40-63},attn-mot{tokens=40-63}"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, 2, 8).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        context = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(context.transpose(1, 2).reshape(batch, tokens, width))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class TwoModalities(nn.Module):
    """Token ids 0..39 are text, 40..63 are image codes; ``kind`` says so once more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.kinds = nn.Embedding(64, 16), nn.Embedding(2, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 64)

    def forward(self, ids: Tensor, kind: Tensor) -> Tensor:
        x = self.embed(ids) + self.kinds(kind)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def example() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(2))
    return ids, (ids >= 40).long()


def compiled(pipeline: str, dtype: torch.dtype = torch.float32) -> Any:
    return sparsify.compile(TwoModalities().to(dtype), pipeline, example(), reproducer=None)


def layers(model: nn.Module, kind: type[ModalityModule] = ModalityModule) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("pipeline", [BY_IDS, BY_TOKENS])
def test_dense_limit_and_weight_map(pipeline: str, dtype: torch.dtype) -> None:
    model = compiled(pipeline, dtype)
    assert model.report.ok and [s.count("applied") for s in model.report.steps] == [2, 4]
    assert len(layers(model, ModalityFFN)) == 2 and len(layers(model, ModalityLinear)) == 4
    with torch.no_grad(), dense_limit(model):
        (found,) = model.graph(*model.example)
    error, scale = error_between(found, model.golden[0])
    assert error <= LIMITS[dtype] * scale
    moves = [move for step in model.report.steps for move in step.weights]
    before = TwoModalities().to(dtype).state_dict()
    undone = dense_weights(model, moves)
    assert len(undone) == 2 * (6 + 4)
    assert all(torch.equal(tensor, before[path]) for path, tensor in undone.items())


@torch.no_grad()
def test_each_token_runs_its_own_copy_only_and_it_is_counted() -> None:
    model = compiled(BY_IDS)
    ids, kind = example()
    model(ids, kind)
    images = int(kind.sum())
    for layer in layers(model):
        assert layer.counter.rows_of == {0: 22 - images, 1: images}
        assert layer.counter.rows * 2 == layer.counter.rows_dense
    model.reset_counters()
    model(ids[:, :1], torch.zeros(2, 1, dtype=torch.long))  # text alone reads text weights alone
    assert all(layer.counter.rows_of == {0: 2} for layer in layers(model))


@torch.no_grad()
def test_a_changed_copy_changes_its_own_tokens_only() -> None:
    model = compiled("ffn-mot{ids=kind}")
    ids, kind = example()
    layer = layers(model)[-1]  # after the last attention: nothing mixes tokens any more
    before = model(ids, kind)
    layer.down[1].add_(0.5)
    after = model(ids, kind)
    changed = (after - before).abs().amax(-1) > 0
    assert torch.equal(changed, kind.bool())


@torch.no_grad()
def test_attention_stays_global() -> None:
    model = compiled("attn-mot{ids=kind}")
    ids, kind = example()
    before = model(ids, kind)
    for layer in layers(model):
        layer.weight[1].mul_(1.5)
    changed = (model(ids, kind) - before).abs().amax(-1) > 1e-6
    first = kind.bool().int().argmax(1)
    for row, at in enumerate(first.tolist()):  # texts after an image see it, texts before do not
        assert not changed[row, :at].any() and changed[row, at:].all()


@torch.no_grad()
def test_ids_and_ranges_of_token_ids_agree() -> None:
    one, two = compiled(BY_IDS), compiled(BY_TOKENS)
    for a, b in zip(layers(one), layers(two), strict=True):
        for left, right in zip(a.parameters(), b.parameters(), strict=True):
            left[1].mul_(1.25)
            right[1].mul_(1.25)
    assert torch.equal(one(*example()), two(*example()))


def test_save_load_and_verify(tmp_path: Path) -> None:
    model = compiled("ffn-mot{tokens=40-49/50-63},attn-mot{ids=kind modalities=3}")
    with torch.no_grad():
        for layer in layers(model):
            assert layer.modalities == 3
    model.save(tmp_path / "out")
    assert sparsify.verify(tmp_path / "out").ok
    again = sparsify.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(*example()), model(*example()))


def test_gradients_reach_the_copies_of_modalities_in_the_batch() -> None:
    model = compiled(BY_IDS)
    ids, kind = example()
    model(ids, torch.zeros_like(kind)).square().sum().backward()
    for layer in layers(model):
        for parameter in layer.parameters():
            # (a bias of keys alone gets none: softmax does not see it, but it is part of qkv here)
            assert parameter.grad[0].abs().sum() > 0 and parameter.grad[1].abs().sum() == 0
    model.zero_grad()
    model(ids, kind).square().sum().backward()
    assert all(p.grad[1].abs().sum() > 0 for layer in layers(model) for p in layer.parameters())


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    tanh = Program(("up",), (Step("h", "aten.tanh.default", (Ref("up"),)),), "h")
    layer = ModalityFFN(
        draw(3, 5, 4), None, draw(3, 4, 5), draw(3, 5), None, draw(3, 4), activation=tanh
    )
    kinds = torch.tensor([[0, 2, 2], [1, 0, 2]])

    def run(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        weights = {"up": up, "down": down, "down_bias": bias}
        return torch.func.functional_call(layer, weights, (x, kinds))

    assert torch.autograd.gradcheck(run, (draw(2, 3, 4), layer.up, layer.down, layer.down_bias))


def test_wrong_ids_are_errors() -> None:
    model = compiled("ffn-mot{ids=kind}")
    _, kind = example()
    with pytest.raises(BadInput, match="modality id 1000"), torch.no_grad():
        layers(model)[0](torch.randn(2, 11, 16), kind * 1000)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "nothing says which modality"),
        ("{ids=kind tokens=40-63}", "both ids= and tokens="),
        ("{ids=kinds}", "no integer input 'kinds'"),
        ("{tokens=60-40}", "no list of ranges"),
        ("{tokens=1-9/5-12}", "overlap"),
    ],
)
def test_refusals(options: str, reason: str) -> None:
    remarks = compiled(f"ffn-mot{options}").report.steps[0].remarks
    assert len(remarks) == 2 and all(r.kind == "left" and reason in r.reason for r in remarks)


def test_token_ranges_on_a_language_model() -> None:
    model = sparsify.compile(captured("llama"), "ffn-mot{tokens=64-127}", reproducer=None)
    assert model.report.ok and model.report.steps[0].count("applied") == 2
    dense = sparsify.compile(captured("llama"), "ffn-moe", reproducer=None)
    ids = torch.tensor([[3, 70, 9, 100]])
    assert torch.equal(model.generate(ids, max_new_tokens=6), dense.generate(ids, max_new_tokens=6))
