"""Casts that do nothing in float32 come back in narrower dtypes, where they matter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsify.capture import capture
from sparsify.errors import BadInput
from sparsify.runtime.model import SparseModel


class Norm(nn.Module):
    """RMS norm in float32, the way language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """A residual block with rotary-like positions, computed in float32 and cast back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = Norm(), nn.Linear(8, 8)

    def forward(self, x, positions):
        angle = positions[..., None].float() / 3.0
        x = x * angle.cos().to(x.dtype)
        return x + self.linear(self.norm(x))


@pytest.fixture
def pair() -> tuple[Block, SparseModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Block()
    x, positions = torch.randn(2, 5, 8), torch.arange(1000, 1005).repeat(2, 1)
    return model, SparseModel.of(capture(model, (x, positions))), x, positions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_capture_runs_in_half_precision_bit_for_bit(pair, dtype) -> None:
    model, sparse, x, positions = pair
    half = copy.deepcopy(model).to(dtype)
    moved = copy.deepcopy(sparse).to(dtype)
    assert torch.equal(moved(x.to(dtype), positions), half(x.to(dtype), positions))
    assert "float32" in moved.graph.code


def test_moving_back_leaves_no_trace(pair) -> None:
    _, sparse, x, positions = pair
    code, dense = sparse.graph.code, sparse(x, positions)
    moved = copy.deepcopy(sparse).bfloat16().double().bfloat16().float()
    assert moved.graph.code == code
    torch.testing.assert_close(moved(x, positions), dense, rtol=0.05, atol=0.05)  # rounded weights


def test_float64_has_no_float32_left(pair) -> None:
    model, sparse, x, positions = pair
    moved = copy.deepcopy(sparse).double()
    assert "float32" not in moved.graph.code
    dense = copy.deepcopy(model).double()
    ours = moved(x.double(), positions)
    # The dense model still divides positions by three in float32: 1000/3 has an error of 1e-5.
    torch.testing.assert_close(ours, dense(x.double(), positions), rtol=1e-3, atol=1e-3)


def test_a_bfloat16_capture_keeps_its_own_upcasts(pair) -> None:
    model, _, x, positions = pair
    half = copy.deepcopy(model).bfloat16()
    sparse = SparseModel.of(capture(half, (x.bfloat16(), positions)))
    assert torch.equal(sparse(x.bfloat16(), positions), half(x.bfloat16(), positions))
    wide = copy.deepcopy(sparse).float()
    assert "bfloat16" not in wide.graph.code
    torch.testing.assert_close(
        wide(x, positions), copy.deepcopy(half).float()(x, positions), rtol=1e-5, atol=1e-5
    )


def test_a_model_that_cannot_be_narrowed_says_so() -> None:
    class Pinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            # A softmax in float64 and back to float32: a matmul then meets two dtypes.
            return x @ torch.softmax(self.weight, -1, dtype=torch.float64).float()

    sparse = SparseModel.of(capture(Pinned(), torch.randn(2, 4)))
    sparse.graph.meta["dtype"] = torch.float32
    for node in sparse.graph.graph.nodes:  # as if the cast were hidden in an operator
        if node.target is torch.ops.aten.to.dtype:
            node.target, node.args = torch.ops.aten._to_copy.default, node.args[:1]
            node.kwargs = {"memory_format": None, "dtype": torch.float32}
            node.meta["captured"] = {}
    with pytest.raises(BadInput, match="cannot be moved to bfloat16") as caught:
        copy.deepcopy(sparse).bfloat16()
    assert "compile it again" in str(caught.value.help)
