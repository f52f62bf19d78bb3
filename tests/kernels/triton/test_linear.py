"""Routed linear kernels against the eager module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.codegen.triton import linear
from sparsify.core import Refused
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from tests.kernels.triton.closeness import close


def make(inputs: int, outputs: int, *, centre: bool, bias: bool, active: float) -> RoutedLinear:
    with torch.no_grad():
        select = Magnitude(
            torch.rand(inputs) + 0.5, torch.randn(inputs) * 0.1 if centre else None,
            rule="threshold",
        )  # fmt: skip
        select.calibrate(torch.randn(64, inputs))
        select.set_active(active)
        columns = torch.randn(inputs, outputs) / inputs**0.5
        module = RoutedLinear(columns, torch.randn(outputs) if bias else None, select)
    return module.eval().requires_grad_(False)


def both(module: RoutedLinear, x: torch.Tensor) -> None:
    module.kernel = None
    module.counter.reset()
    wanted = module(x)
    eager = module.counter.units_live, module.counter.tokens, module.counter.units_total
    module.counter.reset()
    module.kernel = linear.lower(module)
    ran: list[bool] = []
    inner = module.kernel
    module.kernel = lambda m, *a: ran.append(True) or inner(m, *a)
    found = module(x)
    assert ran
    close(found, wanted, module.columns.shape[0])
    counter = module.counter
    if x.numel():
        assert (counter.units_live, counter.tokens, counter.units_total) == eager
        assert counter.units_live <= counter.rows <= counter.rows_dense


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 150), st.integers(1, 150), st.booleans(), st.booleans(),
    st.sampled_from([0.05, 0.5, 0.9]), st.integers(0, 99),
)  # fmt: skip
def test_matches_eager_on_random_shapes(tokens, inputs, outputs, centre, bias, active, seed):
    torch.manual_seed(seed)
    module = make(inputs, outputs, centre=centre, bias=bias, active=active)
    both(module, torch.randn(tokens, inputs))


@pytest.mark.slow
def test_matches_eager_on_500_shapes():
    generator = torch.Generator().manual_seed(1)

    def draw(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    for case in range(500):
        torch.manual_seed(case)
        module = make(draw(300), draw(300), centre=case % 2 == 0, bias=case % 3 == 0,
                      active=(0.1, 0.5, 0.8)[case % 3])  # fmt: skip
        both(module, torch.randn(draw(3 if case % 4 == 0 else 150), module.columns.shape[0]))


@pytest.mark.parametrize("tokens", [1, 5])
def test_no_live_feature_gives_offset_and_bias(tokens):
    module = make(48, 70, centre=True, bias=True, active=0.5)
    both(module, module.select.centre.expand(tokens, -1).clone())


@pytest.mark.parametrize("tokens", [1, 20])
def test_long_reductions_are_split(tokens):
    torch.manual_seed(3)
    module = make(1100, 130, centre=True, bias=True, active=0.4)
    both(module, torch.randn(tokens, 1100))


def test_non_contiguous_inputs():
    torch.manual_seed(4)
    module = make(64, 33, centre=False, bias=True, active=0.5)
    both(module, torch.randn(64, 10).t())
    both(module, torch.randn(3, 6, 130)[:, ::2, 1:65])


@pytest.mark.parametrize("tokens", [1, 9])
def test_half_precision(tokens):
    torch.manual_seed(5)
    module = make(256, 96, centre=True, bias=True, active=0.5).half()
    both(module, torch.randn(tokens, 256).half())


@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients_are_those_of_eager(tokens):
    torch.manual_seed(6)
    module = make(40, 30, centre=True, bias=True, active=0.5).requires_grad_(True)
    x = torch.randn(tokens, 40, requires_grad=True)
    g = torch.randn(tokens, 30)
    leaves = (x, module.columns, module.offset, module.bias)
    wanted = torch.autograd.grad(module(x), leaves, g)
    y, _ = linear.routed_linear(
        x, module.columns, module.select.scale, module.select.centre, module.offset, module.bias,
        module.select.threshold,
    )  # fmt: skip
    for a, b in zip(torch.autograd.grad(y, leaves, g), wanted, strict=True):
        close(a, b, 40)


def test_export_and_compile_see_one_op():
    module = make(40, 30, centre=False, bias=False, active=0.5)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            self.cut = float(module.select.threshold)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            m = self.inner
            return linear.routed_linear(x, m.columns, m.select.scale, None, None, None, self.cut)[0]

    model, x = Model(), torch.randn(6, 40)
    graph = torch.export.export(model, (x,)).graph
    ops = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert [o for o in ops if "getitem" not in o] == ["sparsify.routed_linear.default"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(x), module(x), 40)
    torch.library.opcheck(
        linear.routed_linear,
        (x, module.columns, module.select.scale, None, None, None, module.select.threshold),
    )


def test_rules_that_rank_are_refused():
    module = make(40, 30, centre=False, bias=False, active=0.5)
    module.select.rule = "top-k"
    with pytest.raises(Refused, match="ranks"):
        linear.lower(module)
