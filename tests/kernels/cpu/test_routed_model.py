"""A whole model with CPU kernels for its projections and heads: same outputs, same counters."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsify
from sparsify.codegen.cpu import build
from sparsify.codegen.cpu.linear import LinearKernel
from sparsify.codegen.cpu.lower import kernel_of
from sparsify.core import Refused
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.inputs import RoutedLinear
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
            counted = [(path, copy.copy(c)) for path, c in counters(model)]
            for m, kernel in found.items():

                def run(module: RoutedModule, *inputs: torch.Tensor, k: object = kernel) -> object:
                    y = k(module, *inputs)  # type: ignore[operator]
                    used.update([type(module).__name__] if y is not None else [])
                    return y

                m.kernel = run
            reset(model)
            torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=1e-4, atol=1e-5)
            assert [(path, copy.copy(c)) for path, c in counters(model)] == counted
        for m in found:
            m.kernel = None
    assert used == kinds


@torch.no_grad()
def test_projections_of_one_input_are_one_call(
    monkeypatch: pytest.MonkeyPatch, kernels: None
) -> None:
    tokens = torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(2))
    model = sparsify.compile("zoo:llama", "hidden-route", calibration=tokens.split(4), verify="off")
    model.set_active(0.5)
    projections = [m for m in model.modules() if isinstance(m, RoutedLinear)]
    cache = model(input_ids=tokens[:1, :9]).past_key_values
    step = {"input_ids": tokens[:1, 9:10], "past_key_values": cache}
    expected = model(**copy.deepcopy(step)).logits
    for module in projections:
        module.kernel = kernel_of(module)
    asked: list[int] = []
    together = LinearKernel.together
    monkeypatch.setattr(
        LinearKernel,
        "together",
        lambda self, modules, x: asked.append(len(modules)) or together(self, modules, x),
    )
    reset(model)
    found = model(**copy.deepcopy(step)).logits
    # queries, keys and values; what attention gives; gate and up; down
    assert asked == [3, 1, 2, 1] * (len(projections) // 7)
    assert all(m.counter.tokens == 1 for m in projections)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.tidied(tokens=1)["projections of one input computed in one call"] == sum(
        n - 1 for n in asked
    )
    seen: list[str] = []
    for module in projections:
        module.register_forward_hook(lambda *_: seen.append("hook"))
    model(**copy.deepcopy(step))
    assert len(seen) == len(projections)
