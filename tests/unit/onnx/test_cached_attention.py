"""Attention with its cache inside, and its products as one: where they are the same, only there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.codegen.onnx import cached_attention, parity, translate, weights, write
from sparsify.codegen.onnx.codes_in_graph import put_codes
from sparsify.codegen.onnx.export import Exported
from sparsify.codegen.onnx.trace import silenced
from sparsify.runtime.calling import ModuleCall, Slot
from tests.contract.zoo_captures import captured

pytest.importorskip("onnxruntime")
NAMES = ("x", "past_k", "past_v", "mask", "turns")
HEADS, GROUPS, WIDTH = 4, 2, 8
SIZES = ((2, 3, 7), (1, 1, 9), (3, 5, 0))  # batch, tokens, cached


class Attending(nn.Module):
    """Attention with a cache as language models write it, and with one thing that is different."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd = odd
        width = HEADS * WIDTH
        self.q = nn.Linear(width, width, bias=odd == "bias")
        self.k, self.v = (nn.Linear(width, GROUPS * WIDTH, bias=False) for _ in "kv")
        self.norm = nn.RMSNorm(WIDTH)

    def apart(self, joined: Tensor, heads: int) -> Tensor:
        return joined.view(*joined.shape[:2], heads, WIDTH).transpose(1, 2)

    def forward(
        self, x: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor, turns: Tensor
    ) -> tuple[Tensor, ...]:
        q = self.apart(self.q(x), HEADS)
        k = self.apart(self.k(x + 1 if self.odd == "other rows" else x), GROUPS)
        v = self.apart(self.v(x), GROUPS)
        if self.odd == "norm":
            q = self.norm(q)
        angles = torch.cat([turns, turns], -1)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        fresh = [(k, past_k), (v, past_v)] if self.odd == "order" else [(past_k, k), (past_v, v)]
        k, v = (torch.cat(pair, 2) for pair in fresh)
        y = nn.functional.scaled_dot_product_attention(q, wide(k), wide(v), mask)
        if self.odd == "read apart":
            k = k + 1
        joined = y.transpose(1, 2).reshape(*x.shape)
        return joined + (q.mean() if self.odd == "heads" else 1), k, v


def wide(x: Tensor) -> Tensor:
    """Every head for two queries."""
    batch, heads, keys, width = x.shape
    return x.unsqueeze(2).expand(batch, heads, 2, keys, width).reshape(batch, -1, keys, width)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def example(batch: int, tokens: int, cached: int) -> list[Tensor]:
    past = [torch.randn(batch, GROUPS, cached, WIDTH) for _ in "kv"]
    mask = torch.ones(batch, 1, tokens, cached + tokens, dtype=torch.bool).tril(cached)
    mask[0, ..., : min(2, cached)] = False
    turns = torch.randn(batch, tokens, WIDTH // 2)
    return [torch.randn(batch, tokens, HEADS * WIDTH), *past, mask, turns]


@functools.cache
def translated(odd: str) -> tuple[Attending, Any]:
    module, free = Attending(odd).eval(), torch.export.Dim.AUTO
    flat = tuple(example(2, 3, 7))
    dims = tuple({axis: free for axis, size in enumerate(t.shape) if size not in
                  (HEADS * WIDTH, WIDTH, 1) and (t.dim() < 4 or axis != 1)
                  and axis < t.dim() - (t.dim() == 3)} for t in flat)  # fmt: skip
    with torch.no_grad(), silenced():
        program = torch.export.export(module, flat, dynamic_shapes=dims, strict=False)
    slots = tuple(Slot(name, (None,) * t.dim()) for name, t in zip(NAMES, flat, strict=True))
    call = ModuleCall(slots, NAMES, {}, {"kind": "tuple", "items": [{"kind": "tensor"}] * 3})
    return module, translate.translated(program, call, 23)


@pytest.mark.parametrize(
    ("odd", "cached", "together"),
    [
        ("", 1, 1),
        ("bias", 1, 0),
        pytest.param("other rows", 1, 0, marks=pytest.mark.slow),
        pytest.param("read apart", 1, 1, marks=pytest.mark.slow),
        pytest.param("norm", 0, 0, marks=pytest.mark.slow),
        pytest.param("order", 0, 0, marks=pytest.mark.slow),
        ("heads", 0, 0),
    ],
)
def test_where_it_is_the_same(odd: str, cached: int, together: int, tmp_path: Path) -> None:
    module, model = translated(odd)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Attention") == 1
    assert list(translate.rewrites(model).values()) == [1] * (cached + together)
    assert kinds.count("MatMul") + kinds.count("Gemm") == (1 if together else 3)
    assert ("Concat" in kinds) is not bool(cached)
    write.write(model, tmp_path / "a.onnx", external=None, force=False)
    running = parity.session(tmp_path / "a.onnx")
    for sizes in SIZES:
        flat = example(*sizes)
        with torch.no_grad():
            expected = module(*flat)
        for found, mine in zip(parity.run(running, NAMES, flat), expected, strict=True):
            assert found.shape == mine.shape
            assert float((found - mine).abs().max()) <= 1e-5 * float(mine.abs().max())


def test_the_standards_evaluator_agrees(tmp_path: Path) -> None:
    reference = pytest.importorskip("onnx.reference")
    module, model = translated("")
    write.write(model, tmp_path / "a.onnx", external=None, force=False)
    flat = example(2, 3, 7)
    feed = {name: tensor.numpy() for name, tensor in zip(NAMES, flat, strict=True)}
    with torch.no_grad():
        expected = module(*flat)
    running = reference.ReferenceEvaluator(str(tmp_path / "a.onnx"))
    for found, mine in zip(running.run(None, feed), expected, strict=True):
        assert float((torch.from_numpy(found) - mine).abs().max()) <= 1e-5


def test_a_second_time_there_is_nothing_to_do() -> None:
    model = translated("")[1].clone()
    assert cached_attention.with_cache(model) == 0


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_codes_are_those_of_three_matrices(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LEAST", 64)
    module, whole = translated("")
    apart = translated("other rows")[1]
    made = {}
    for name, model in (("whole", whole.clone()), ("apart", apart.clone())):
        plans, told = weights.planned(model, precision, module)
        assert sum(told.stored.values()) == (1 if name == "whole" else 3), told
        columns = [plan.values if plan.values.shape[0] == 32 else plan.values.T for plan in plans]
        made[name] = {tuple(c) for array in columns for c in array.T.tolist()}
        put_codes(model, plans)
    assert made["whole"] == made["apart"]


def test_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    rewrites = translate.rewrites(translated("")[1].clone())
    left = weights.Weights("float32", {}, {})
    found = Exported(
        (tmp_path / "a.onnx",), "ort", 23, {}, {}, {}, (), left, rewrites=rewrites
    )  # fmt: skip
    assert found.text().splitlines()[1:] == [
        "  1 x Attention with its cache", "  1 x queries, keys and values as one product",
    ]  # fmt: skip
    assert found.to_dict()["rewrites"] == rewrites


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_a_language_model(precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "LEAST", 64)
    model = sparsify.compile(captured("llama"), "ffn-moe", reproducer=None)
    found = model.export(tmp_path / "a.onnx", target="ort", routing="mask", weights=precision)
    assert list(found.rewrites.values()) == [2, 2]
    assert found.operators["Attention"] == 2
    assert not {"made by the exporter", "of Split"} & set(found.weights.left)
    assert all(case.relative <= 1e-4 for case in found.cases if case.held)
