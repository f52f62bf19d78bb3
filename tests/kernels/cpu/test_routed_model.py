"""A whole model with CPU kernels for its projections and heads: same outputs, same counters."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify.codegen.cpu import build
from sparsify.codegen.cpu.lower import kernel_of
from sparsify.core import Refused
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.spec import RoutedModule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "kinds"),
    [
        ("hidden-route", {"RoutedLinear"}),
        ("attn-moh", {"RoutedRows", "RoutedAttend", "RoutedColumns"}),
    ],
)
def test_model_with_kernels(pipeline: str, kinds: set[str]) -> None:
    try:
        build.compiler()
    except build.NoCompiler as missing:
        pytest.skip(missing.what)
    tokens = torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(2))
    model = sparsify.compile("zoo:llama", pipeline, calibration=tokens.split(4), verify="off")
    model.set_active(0.5)
    found = {}
    for m in model.modules():
        if isinstance(m, RoutedModule):
            try:
                found[m] = kernel_of(m)
            except Refused:
                continue
    assert {type(m).__name__ for m in found} == kinds
    used = set()
    for length in (1, 5):
        x = tokens[:1, :length]
        with torch.no_grad():
            reset(model)
            expected = model(input_ids=x).logits
            counted = [(path, vars(c).copy()) for path, c in counters(model)]
            for m, kernel in found.items():

                def run(module: RoutedModule, *inputs: torch.Tensor, k: object = kernel) -> object:
                    y = k(module, *inputs)  # type: ignore[operator]
                    used.update([type(module).__name__] if y is not None else [])
                    return y

                m.kernel = run
            reset(model)
            torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=1e-4, atol=1e-5)
            assert [(path, vars(c).copy()) for path, c in counters(model)] == counted
        for m in found:
            m.kernel = None
    assert used == kinds
