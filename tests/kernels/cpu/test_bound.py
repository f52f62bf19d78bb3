"""Bound calls: whatever changes between two steps is seen by the second, as eager sees it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import sparsify
from sparsify.codegen.cpu.ffn import FfnKernel
from sparsify.codegen.cpu.lower import kernel_of
from sparsify.runtime.bound import Bound
from sparsify.runtime.counters import counters, reset
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.inputs import RoutedLinear
from sparsify.runtime.model import SparseModel

TOKENS = torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(2))


def few(tokens: int, active: float) -> Any:
    return "few"


@pytest.fixture(scope="module")
def made() -> SparseModel:
    model = sparsify.compile(
        "zoo:llama", "ffn-moe,hidden-route", calibration=TOKENS.split(4), verify="off"
    )
    model.set_active(0.5)
    return model


@pytest.fixture
def lowered(made: SparseModel, kernels: None) -> SparseModel:
    model = copy.deepcopy(made)
    for module in model.modules():
        if type(module) is RoutedLinear:
            module.kernel = kernel_of(module)
        elif type(module) is RoutedFFN:
            module.kernel = FfnKernel(module, few)
    return model


def step(model: SparseModel) -> torch.Tensor:
    with torch.no_grad():
        cache = model(input_ids=TOKENS[:1, :9]).past_key_values
        found: torch.Tensor = model(input_ids=TOKENS[:1, 9:10], past_key_values=cache).logits
    return found


def eager(model: SparseModel) -> torch.Tensor:
    """The same without kernels, in a copy."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, (RoutedLinear, RoutedFFN)):
            module.kernel = None
    return step(twin)


def first(model: SparseModel, kind: type[Any] = RoutedLinear) -> Any:
    return next(m for m in model.modules() if type(m) is kind)


def parent(model: SparseModel) -> tuple[nn.Module, str]:
    path = next(p for p, m in model.graph.named_modules() if type(m) is RoutedLinear)
    owner, _, name = path.rpartition(".")
    return model.graph.get_submodule(owner), name


def other(model: SparseModel) -> nn.Module:
    twin = copy.deepcopy(first(model))
    twin.columns.mul_(3.0)
    return twin  # type: ignore[no-any-return]


def moved(tensor: Any) -> None:
    tensor.data = tensor.data * 2 + 0.1


def ones(outputs: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(*x.shape[:-1], outputs)


CHANGES: dict[str, Callable[[SparseModel], Any]] = {
    "values in place": lambda m: first(m).columns.mul_(2.0),
    "data of columns": lambda m: moved(first(m).columns),
    "data of offset": lambda m: moved(first(m).offset),
    "data of experts": lambda m: moved(first(m, RoutedFFN).up),
    "data of stand-ins": lambda m: moved(first(m, RoutedFFN).dropped),
    "data of a router": lambda m: moved(first(m, RoutedFFN).router.weight),
    "a new parameter": lambda m: setattr(
        first(m), "columns", nn.Parameter(first(m).columns * 2, requires_grad=False)
    ),
    "a parameter slipped in": lambda m: first(m)._parameters.update(
        columns=nn.Parameter(first(m).columns * 2)
    ),
    "a buffer": lambda m: setattr(first(m).select, "scale", first(m).select.scale.flip(0)),
    "another module": lambda m: setattr(*parent(m), other(m)),
    "a module slipped in": lambda m: parent(m)[0]._modules.update({parent(m)[1]: other(m)}),
    "the dial": lambda m: m.set_active(0.25),
    "one dial": lambda m: first(m).select.set_active(0.25),
    "neurons' dial": lambda m: first(m, RoutedFFN).inside.set_active(0.25),
    "all live": lambda m: m.set_active(1.0),
    "dispatch": lambda m: setattr(first(m), "dispatch", "grouped"),
    "state": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "forward": lambda m: setattr(
        first(m), "forward", functools.partial(ones, first(m).columns.shape[1])
    ),
    "a hook": lambda m: first(m).register_forward_hook(lambda own, x, y: y * 2),
    "a hook before": lambda m: first(m).register_forward_pre_hook(lambda own, x: x[0] * 2),
    "a hook of a router": lambda m: first(m, RoutedFFN).router.register_forward_hook(
        lambda own, x, y: torch.ones_like(y)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_are_seen(lowered: SparseModel, change: str) -> None:
    before = step(lowered)
    torch.testing.assert_close(before, eager(lowered), rtol=1e-4, atol=1e-5)
    assert torch.equal(step(lowered), before)
    CHANGES[change](lowered)
    after = step(lowered)
    torch.testing.assert_close(after, eager(lowered), rtol=1e-4, atol=1e-5)
    if change != "dispatch":
        assert not torch.equal(after, before)


def test_a_hook_that_turns_a_dial_is_seen_in_the_same_step(lowered: SparseModel) -> None:
    step(lowered)
    modules = [m for m in lowered.modules() if type(m) is RoutedLinear]
    hook = modules[0].register_forward_hook(lambda *_: modules[-1].select.set_active(0.1))
    step(lowered)
    modules[-1].select.set_active(0.5)
    torch.testing.assert_close(step(lowered), eager(lowered), rtol=1e-4, atol=1e-5)
    hook.remove()
    modules[-1].select.set_active(0.5)
    torch.testing.assert_close(step(lowered), eager(lowered), rtol=1e-4, atol=1e-5)


def test_hooks_of_all_modules(lowered: SparseModel) -> None:
    step(lowered)
    seen: list[nn.Module] = []
    hook = register_module_forward_hook(lambda own, x, y: seen.append(own))
    try:
        step(lowered)
    finally:
        hook.remove()
    routed = [m for m in lowered.modules() if type(m) in (RoutedLinear, RoutedFFN)]
    assert all(any(m is other for other in seen) for m in routed)


@torch.no_grad()
def test_weights_of_one_call(lowered: SparseModel) -> None:
    before = step(lowered)
    twice = {name: weight * 2 for name, weight in lowered.named_parameters()}
    cache = lowered(input_ids=TOKENS[:1, :9]).past_key_values
    given = {"input_ids": TOKENS[:1, 9:10], "past_key_values": cache}
    found = torch.func.functional_call(lowered, twice, kwargs=copy.deepcopy(given)).logits
    torch.testing.assert_close(step(lowered), before)
    for module in lowered.modules():
        if isinstance(module, (RoutedLinear, RoutedFFN)):
            module.kernel = None
    expected = torch.func.functional_call(lowered, twice, kwargs=given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_modules_are_looked_at_once(lowered: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        Bound, "_read", lambda own, do=Bound._read: read.append(len(own.wanted)) or do(own)
    )
    step(lowered)
    count = len(read)
    assert count and max(read) == 2 * 3  # per layer: q, k, v; what attention gives; the experts
    counted = []
    for _ in range(2):
        reset(lowered)
        step(lowered)
        counted.append([(path, copy.copy(counter)) for path, counter in counters(lowered)])
    assert len(read) == count
    assert counted[0] == counted[1]
    linears = [m.counter for m in lowered.modules() if type(m) is RoutedLinear]
    assert all(c.tokens == 10 and c.units_live > 0 for c in linears)
