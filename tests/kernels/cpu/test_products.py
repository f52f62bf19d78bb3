"""Dense products in C against torch's, and models that decode through them.

Tolerance: a sum of n products in any order is off by at most n * eps * the sum of their magnitudes
(Higham, Accuracy and Stability, 3.1), two such sums by twice that; bfloat16 results by one rounding
more.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.capture import capture
from sparsify.codegen.cpu import build, products
from sparsify.codegen.cpu.products import Products, products_of, weights_of
from sparsify.runtime.model import SparseModel
from sparsify.zoo import build as zoo

pytestmark = pytest.mark.usefixtures("kernels")
EPS = torch.finfo(torch.float32).eps
linear = torch.nn.functional.linear


def agree(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    want = linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = linear(x.double().abs(), weight.double().abs())
    size = size if bias is None else size + bias.double().abs()
    rounding = torch.finfo(x.dtype).eps / 2 if x.dtype is torch.bfloat16 else 0.0
    assert found.shape == want.shape and found.dtype == x.dtype
    bound = 2 * (x.shape[-1] + 2) * EPS * size + rounding * want.abs()
    assert bool(((found.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (16, 16), (65, 33), (300, 130)])
def test_product_is_linear(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(outputs)
    product = Products({(outputs, inputs, dtype): 8})
    for shape in ((1, inputs), (2, 3, inputs), (8, inputs), (1, 1, inputs)):
        for biased in (False, True):
            weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(shape).to(dtype)
            bias = torch.randn(outputs).to(dtype) if biased else None
            agree(product(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_several_are_one_by_one(tokens: int) -> None:
    """The second weight has no C product beyond 2 tokens: then each goes its own way."""
    torch.manual_seed(tokens)
    product = Products({(300, 130, torch.float32): 8, (65, 130, torch.float32): 2})
    weights = [torch.randn(300, 130), torch.randn(65, 130), torch.randn(300, 130)]
    biases = [torch.randn(300), None, None]
    x = torch.randn(1, tokens, 130)
    found = product.several(x, weights, biases)
    for mine, weight, bias in zip(found, weights, biases, strict=True):
        assert torch.equal(mine, product(x, weight, bias))
        agree(mine, x, weight, bias)


def test_what_c_cannot_read_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    product = Products({(5, 6, torch.float32): 4})
    weight = torch.randn(5, 6)

    def never(*_: Any) -> int:
        raise AssertionError("C was called")

    monkeypatch.setitem(product.run, torch.float32, never)
    cases: list[tuple[Tensor, Tensor]] = [
        (torch.randn(5, 6), weight),  # too many tokens
        (torch.randn(6, 4).t(), weight),  # not dense
        (torch.randn(0, 6), weight),
        (torch.randn(2, 6), torch.randn(6, 5).t()),
        (torch.randn(2, 7), torch.randn(5, 7)),  # a size that was not measured
        (torch.randn(2, 6).double(), weight.double()),
    ]
    for x, w in cases:
        assert torch.equal(product(x, w), linear(x, w))


def test_weights_that_moved_or_went_are_not_read() -> None:
    torch.manual_seed(0)
    product, x = Products({(40, 30, torch.float32): 8}), torch.randn(1, 30)
    weight = nn.Parameter(torch.randn(40, 30))
    agree(product(x, weight), x, weight, None)
    weight.data = torch.randn(40, 30)
    agree(product(x, weight), x, weight, None)
    weight.data.mul_(2)
    agree(product(x, weight), x, weight, None)
    bias = torch.randn(40)
    agree(product(x, weight, bias), x, weight, bias)
    agree(product(x, weight), x, weight, None)
    del weight
    gc.collect()
    assert not product._entries


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """C is used wherever it can be, whatever is faster."""
    monkeypatch.setattr(products, "_limit", lambda size, weights: 8)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixed"])
def test_a_dense_model_decodes_through_them(name: str) -> None:
    made = zoo(name) if name != "mixed" else zoo("llama")
    captured = capture(made.model, made.example)
    model = SparseModel.of(captured)
    if name == "mixed":
        model.bfloat16()
    sizes = weights_of(model.graph)
    ids = torch.randint(3, 60, (2, 7))
    first = model(ids[:, :6])
    want = model(ids[:, 6:], past_key_values=copy.deepcopy(first.past_key_values)).logits
    said = model.lower()
    found = model(ids[:, 6:], past_key_values=copy.deepcopy(first.past_key_values)).logits
    assert said[-1].region_kind == "dense products"
    assert (model.product is not None) == bool(sizes) == (said[-1].kind == "applied")
    scale = float(want.abs().max())
    most = 2e-2 if name == "mixed" else 1e-5  # bfloat16: layers round differently
    assert float((found - want).abs().max()) <= most * scale
    assert copy.deepcopy(model).product is not model.product or model.product is None


def test_slower_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_limit", lambda size, weights: 0)
    made = zoo("llama")
    found, text = products_of(SparseModel.of(capture(made.model, made.example)).graph)
    assert found is None and text == "torch's products are faster here"


def test_without_a_compiler_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(build, "_LOADED", {})
    monkeypatch.setattr(products, "_limit", lambda size, weights: 8)
    made = zoo("llama")
    model = SparseModel.of(capture(made.model, made.example))
    said = model.lower()[-1]
    assert model.product is None and said.kind == "left"
    assert said.suggestion is not None and "gcc" in said.suggestion
