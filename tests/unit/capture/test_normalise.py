"""What normalising removes, and what it must not."""

from __future__ import annotations

import operator

import torch
from torch import nn

from sparsify.capture import capture


def ops(model: nn.Module, *example: torch.Tensor) -> list[str]:
    graph = capture(model, example).graph
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def test_casts_that_do_nothing_go_and_others_stay() -> None:
    class Norm(nn.Module):
        def forward(self, x):
            wide = x.to(torch.float32)
            return (wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(x.dtype)

    assert "aten.to.dtype" not in ops(Norm(), torch.randn(2, 4))
    assert ops(Norm(), torch.randn(2, 4, dtype=torch.bfloat16)).count("aten.to.dtype") == 2


def test_a_copying_cast_stays() -> None:
    class Copies(nn.Module):
        def forward(self, x):
            y = x.to(torch.float32, copy=True)
            y.add_(1)
            return x + y

    x = torch.zeros(2, 3)
    captured = capture(Copies(), x)
    assert torch.equal(captured.graph(x)[0], torch.ones(2, 3))
    assert torch.equal(x, torch.zeros(2, 3))


def test_no_grad_regions_are_inlined_and_stay_without_gradient() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                hidden = self.a(x)
            return self.b(hidden)

    model = Frozen()
    graph = capture(model, torch.randn(2, 3)).graph
    graph(torch.randn(2, 3))[0].sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None


def test_the_rotary_outer_product_survives_autocast() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.rand(4), persistent=False)

        def forward(self, positions):
            with torch.autocast("cpu", enabled=False):
                return self.frequencies[None, :, None] @ positions[:, None, :].float()

    positions = torch.arange(1000, 1005)[None].repeat(2, 1)
    model = Rotary()
    captured = capture(model, positions)
    assert "aten.matmul.default" not in [str(n.target) for n in captured.graph.graph.nodes]
    with torch.autocast("cpu", torch.bfloat16):
        (angles,) = captured.graph(positions)
    assert torch.equal(angles, model(positions))
    assert "frequencies" not in captured.graph.state_dict()  # as in the model
    assert "frequencies" in dict(captured.graph.named_buffers())


def test_constants_made_in_forward_are_kept() -> None:
    class Constant(nn.Module):
        def forward(self, x):
            return x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor(2.0)

    x = torch.randn(2, 3)
    captured = capture(Constant(), x)
    assert torch.equal(captured.graph(x)[0], Constant()(x))


def test_python_operators_on_tensors_have_one_spelling() -> None:
    class Masks(nn.Module):
        def forward(self, a, b):
            return (a & b) | (a ^ b)

    found = ops(Masks(), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    assert "aten.__and__.Tensor" not in found
    assert "aten.bitwise_and.Tensor" in found


def test_sizes_of_the_cache_are_read_once() -> None:
    import pytest

    pytest.importorskip("transformers")
    from sparsify import zoo

    graph = capture(zoo.build("llama").model).graph.graph
    sizes = [n for n in graph.nodes if n.target is torch.ops.aten.sym_size.int]
    sums = [n for n in graph.nodes if n.target is operator.add]
    assert len(sizes) == 3  # batch, new tokens, cached tokens
    assert len(sums) == 1


def test_the_fused_encoder_path_is_not_taken() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    for parameter in model.parameters():  # frozen weights in eval mode: torch would fuse
        parameter.requires_grad_(False)
    found = ops(model.eval(), torch.randn(2, 5, 16))
    assert "aten.scaled_dot_product_attention.default" in found
    assert not any("_transformer_encoder_layer_fwd" in op for op in found)
