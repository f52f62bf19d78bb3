"""Grouped heads in ``Attention``: read once each, and only where they are repeated in a row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify.codegen.onnx import parity, translate, write
from sparsify.codegen.onnx.trace import silenced
from sparsify.runtime.calling import ModuleCall, Slot

pytest.importorskip("onnxruntime")
NAMES = ("q", "k", "v", "mask")


class Grouped(nn.Module):
    """Four query heads over two key/value heads."""

    def __init__(self, *, in_a_row: bool) -> None:
        super().__init__()
        self.in_a_row = in_a_row

    def wide(self, x: Tensor) -> Tensor:
        """(B, 2, S, d) -> (B, 4, S, d): heads 0 0 1 1, or 0 1 0 1."""
        batch, heads, keys, width = x.shape
        apart = x.unsqueeze(2 if self.in_a_row else 1)
        return apart.expand(batch, 2, 2, keys, width).reshape(batch, 2 * heads, keys, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, self.wide(k), self.wide(v), mask)


@pytest.mark.parametrize("in_a_row", [True, False])
def test_repeated_heads(in_a_row: bool, tmp_path: Path) -> None:
    module, free = Grouped(in_a_row=in_a_row), torch.export.Dim.AUTO

    def example(batch: int, tokens: int, keys: int) -> list[Tensor]:
        cached = [torch.randn(batch, 2, keys, 8) for _ in "kv"]
        mask = torch.zeros(batch, 1, tokens, keys)
        mask[..., 0] = torch.finfo().min
        return [torch.randn(batch, 4, tokens, 8), *cached, mask]

    dims = ({0: free, 2: free}, {0: free, 2: free}, {0: free, 2: free}, {0: free, 2: free, 3: free})
    with torch.no_grad(), silenced():
        program = torch.export.export(
            module, tuple(example(2, 3, 7)), dynamic_shapes=dims, strict=False
        )
    slots = tuple(Slot(name, (None,) * 4) for name in NAMES)
    model = translate.translated(program, ModuleCall(slots, NAMES, {}, {"kind": "tensor"}), 23)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Attention") == 1
    assert ("Expand" in kinds) is not in_a_row
    write.write(model, tmp_path / "a.onnx", external=None, force=False)
    running = parity.session(tmp_path / "a.onnx")
    for sizes in ((2, 3, 7), (1, 1, 9), (3, 5, 5)):
        flat = example(*sizes)
        (found,) = parity.run(running, NAMES, flat)
        assert float((found - module(*flat)).abs().max()) <= 1e-5
