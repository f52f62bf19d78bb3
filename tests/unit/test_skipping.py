"""Skipped means skipped: the budget that was asked for is met, and dead units are not computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.counters import counters
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.router import Router
from tests.contract.zoo_captures import captured, tokens_of

MODELS = ("llama", "nanogpt", "gpt2")
PIPELINES = ("ffn-moe{shared=1}", "attn-moh{shared=1}", "ffn-moe{shared=1},attn-moh{shared=1}")
BUDGETS = (0.4, 0.5, 0.75, 1.0)


@functools.cache
def compiled(name: str, pipeline: str, calibrated: bool = False) -> Any:
    cap = captured(name)
    calibration = tokens_of(cap, name) if calibrated else None
    return sparsify.compile(cap, pipeline, calibration=calibration, reproducer=None)


@contextlib.contextmanager
def at(model: Any, active: float) -> Iterator[None]:
    model.set_active(active)
    model.reset_counters()
    try:
        yield
    finally:
        model.set_active(1.0)


def layers(model: nn.Module) -> dict[str, float]:
    """Path -> live fraction of one module per routed layer (the three of an attention agree)."""
    modules = dict(model.named_modules())
    return {
        path: c.live_fraction
        for path, c in counters(model)
        if isinstance(modules[path], RoutedFFN | RoutedAttend)
    }


@contextlib.contextmanager
def selections(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Router path -> the selection that it gave (the same call's, by a hook on the router)."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, select: Tensor) -> None:
            found[path] = select.detach()

        return hook

    routers = [(p, m) for p, m in model.named_modules() if isinstance(m, Router)]
    handles = [m.register_forward_hook(keep(p)) for p, m in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def router_of(path: str, module: nn.Module) -> str:
    """The router that selects for the module at ``path``."""
    own = f"{path}.router"
    return own if isinstance(module, RoutedFFN) else f"{path.rpartition('.')[0]}.router"


# ---------------------------------------------------------------------------- the budget is met


@pytest.mark.parametrize("active", BUDGETS)
@pytest.mark.parametrize("pipeline", PIPELINES[:2])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_top_k_meets_the_budget_on_average(name: str, pipeline: str, active: float) -> None:
    model = compiled(name, pipeline)
    with at(model, active):
        model.graph(*model.example)
        live = layers(model)
    units = [m.units for m in model.modules() if isinstance(m, Router)]
    # whole units: the error left over after diffusion is at most half a unit over all layers
    assert abs(sum(live.values()) / len(live) - active) <= 0.5 / sum(units) + 1e-9
    if name == "llama" and pipeline.startswith("ffn"):
        assert abs(sum(live.values()) / len(live) - active) <= 0.02


@pytest.mark.parametrize("active", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_thresholds_meet_the_budget_on_the_calibration_tokens(name: str, active: float) -> None:
    model = compiled(name, "ffn-moe{shared=1},attn-moh{shared=1}", calibrated=True)
    assert {m.rule for m in model.modules() if isinstance(m, Router)} == {"threshold"}
    ids = torch.cat(tokens_of(captured(name), name))
    with at(model, active):
        model(input_ids=ids)
        live = list(layers(model).values())
    assert abs(sum(live) / len(live) - active) <= 0.02


# ---------------------------------------------------------------------------- dead is not computed


@pytest.mark.parametrize("calibrated", [False, True], ids=["top-k", "threshold"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_multiplied_are_the_selected_pairs(name: str, calibrated: bool) -> None:
    if calibrated and name == "nanogpt":
        pytest.skip("calibration text is for causal language models")
    model = compiled(name, PIPELINES[2], calibrated)
    modules = dict(model.named_modules())
    with at(model, 0.5), selections(model) as chosen:
        model.graph(*model.example)
        counted = counters(model)
        assert len(counted) >= 6
        for path, counter in counted:
            select = chosen[router_of(path, modules[path])]
            pairs = int((select != 0).sum())
            assert counter.rows == counter.units_live == pairs, path
            assert counter.rows_dense == counter.units_total == select.numel(), path
            assert counter.rows < counter.rows_dense, path
            assert set(select.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_of_units_that_nobody_uses_are_not_read(name: str) -> None:
    """Their weights may be NaN: any product with them would show."""
    model = compiled(name, PIPELINES[2])
    modules = dict(model.named_modules())
    with at(model, 0.5), selections(model) as chosen:
        ids = torch.full((1, 1), 5)
        one = model(input_ids=ids).logits if name != "nanogpt" else model(ids)
        spoilt = 0
        undo: list[tuple[Tensor, Tensor]] = []
        for path, module in modules.items():
            if not isinstance(module, RoutedFFN | RoutedRows | RoutedColumns):
                continue
            select = chosen[router_of(path, module)].reshape(-1, module_units(module))
            dead = (select != 0).sum(0) == 0
            spoilt += int(dead.sum())
            packed = (
                [module.up, module.gate, module.down]
                if isinstance(module, RoutedFFN)
                else [module.blocks]
            )
            for weight in packed:
                if weight is not None:
                    undo.append((weight, weight.detach().clone()))
                    weight[dead] = float("nan")
        assert spoilt
        two = model(input_ids=ids).logits if name != "nanogpt" else model(ids)
        for weight, before in undo:
            weight.copy_(before)
    assert torch.equal(one, two)


def module_units(module: nn.Module) -> int:
    return module.experts if isinstance(module, RoutedFFN) else module.units


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dead_query_rows_are_zero_and_dead_heads_give_zero(name: str) -> None:
    model = compiled(name, PIPELINES[1])
    values: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _m, _i, out, p=p: values.__setitem__(p, out))
        for p, m in model.named_modules()
        if isinstance(m, RoutedAttend)
    ]
    with at(model, 0.5), selections(model) as chosen:
        model.graph(*model.example)
    for handle in handles:
        handle.remove()
    assert values
    for path, y in values.items():
        live = (chosen[f"{path.rpartition('.')[0]}.router"] != 0).transpose(1, 2)
        assert bool((y[~live] == 0).all()) and bool((y[live].abs().sum(-1) > 0).all())


@torch.no_grad()
def test_a_dead_group_of_keys_and_values_is_not_read() -> None:
    """llama shares 2 key/value heads among 4 heads; one group dead for all tokens may hold NaN."""
    model = compiled("llama", PIPELINES[1])
    attend = next(m for m in model.modules() if isinstance(m, RoutedAttend))
    assert (attend.heads, attend.kv_heads) == (4, 2)
    generator = torch.Generator().manual_seed(0)
    batch, tokens, keys = 2, 3, 5
    q = torch.randn(batch, 4, tokens, attend.head_dim, generator=generator)
    k = torch.randn(batch, 2, keys, attend.head_dim, generator=generator)
    v = torch.randn(batch, 2, keys, attend.value_dim, generator=generator)
    mask = torch.zeros(batch, 1, tokens, keys)
    select = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(batch, tokens, 4).clone()
    select[0, 1, 3] = 1  # one token uses the whole second group
    select[1, 2] = 0  # one token uses no head
    operands = [mask] * (len(attend.score.inputs) - 1)
    expected = attend(q, k, v, select, *operands)
    k[:, 0] = v[:, 0] = float("nan")
    k[:, 0, 0] = float("inf")
    attend.counter.reset()
    found = attend(q, k, v, select, *operands)
    assert torch.equal(found, expected) and bool(found.isfinite().all())
    assert attend.counter.rows == int(select.sum()) == batch * tokens
    assert attend.counter.rows_dense == batch * tokens * 4
    attend.counter.reset()
    nothing = attend(q, k, v, torch.zeros_like(select), *operands)
    assert attend.counter.rows == 0 and not bool(nothing.any())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_everything_live_counts_the_dense_rows(name: str) -> None:
    model = compiled(name, PIPELINES[2])
    with at(model, 1.0):
        model.graph(*model.example)
        for path, counter in counters(model):
            assert counter.rows == counter.rows_dense == counter.units_live, path
