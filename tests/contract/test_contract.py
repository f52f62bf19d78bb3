"""The contract of every pass on every zoo model: found, proven, undone, saved, trained.

A new pass in passes/ is picked up here by itself; it brings only tests of what is special to it.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree

import sparsify
from sparsify import registry, zoo
from sparsify.api import share_clone
from sparsify.errors import NothingMatched
from sparsify.match import find
from sparsify.regions import Region
from sparsify.runtime.budget import Budgeted
from sparsify.runtime.depth import DepthRouter
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.model import SparseModel
from sparsify.runtime.router import Router
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import (
    LIMITS,
    MODELS,
    captured,
    compiled,
    tokens_of,
    worst_relative,
)

PASSES = tuple(registry.names())


@functools.cache
def regions_of(name: str) -> tuple[Region, ...]:
    cap = captured(name)
    return tuple(find(share_clone(cap.graph), cap.example).all_regions)


def works(name: str, work: str) -> Any:
    """The model after the pass ran twice (the second time has nothing to do: one compile serves
    all tests); skips where the pass does nothing, once it said why of every region."""
    try:
        model = compiled(name, f"{work},{work}")
    except NothingMatched as error:
        pytest.skip(f"nothing to rewrite: {error}")
    if not any(step.count("applied") for step in model.report.steps):
        assert all(r.reason for step in model.report.steps for r in step.remarks)
        pytest.skip("every region refused, with a reason")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_region_is_found(name: str) -> None:
    made = zoo.build(name)
    regions = regions_of(name)
    kinds = [region.kind for region in regions]
    assert kinds.count("Attention") == made.attention
    assert kinds.count("FeedForward") == made.feed_forward
    assert kinds.count("Projection") >= 2 * made.feed_forward
    assert len({(r.kind, r.path) for r in regions}) == len(regions)
    assert all(region.block is not None for region in regions)
    assert all(region.where for region in regions)


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp64"])
def test_dense_limit(name: str, pipeline: str, dtype: torch.dtype) -> None:
    model = works(name, pipeline)
    if dtype != torch.float32:
        model = compiled(name, pipeline, dtype)
    step = model.report.steps[0]
    assert step.count("applied") > 0
    assert worst_relative(model) <= LIMITS[dtype]
    assert model.report.ok
    kind = registry.get(pipeline).region_type.kind
    regions = [r for r in regions_of(name) if r.kind == kind]
    remarked = [r.region for r in step.remarks if r.kind != "near-miss"]
    assert sorted(remarked) == sorted(r.path for r in regions)
    assert all(r.reason for r in step.remarks)


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_second_run_finds_nothing_more(name: str, pipeline: str) -> None:
    first, second = works(name, pipeline).report.steps
    assert second.count("applied") == 0
    assert second.count("left") == first.count("applied") + first.count("left")


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_names_and_weight_map(name: str, pipeline: str) -> None:
    dense = captured(name).graph
    model = works(name, pipeline)
    before = dict(dense.named_parameters())
    after = dict(model.named_parameters())
    moved = {m.dense for step in model.report.steps for m in step.weights}
    for path, parameter in before.items():
        if path not in moved:
            assert after[path] is parameter, f"{path} was renamed or copied"
    for step in model.report.steps:
        for move in step.weights:
            found: Any = model
            for part in move.sparse.split("."):
                found = getattr(found, part)  # the map names tensors that exist
    moves = [move for step in model.report.steps for move in step.weights]
    undone = dense_weights(model, moves)
    bounded = registry.get(pipeline).claim.kind == "BOUNDED"
    for path, tensor in undone.items():
        same = torch.allclose(tensor, before[path], atol=1e-5) if bounded else None
        assert torch.equal(tensor, before[path]) or same, f"{path} does not come back"
    assert bool(moved) == registry.get(pipeline).moves_weights and set(undone) == moved


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name: str, pipeline: str, tmp_path: Path) -> None:
    model = works(name, pipeline)
    model.set_active(0.5)
    try:
        _saved_and_loaded(model, tmp_path / "out")
    finally:
        model.set_active(1.0)


def _saved_and_loaded(model: SparseModel, folder: Path) -> None:
    model.save(folder)
    again = sparsify.load(folder)
    assert again.pipeline == model.pipeline
    assert again.report.to_dict() == model.report.to_dict()
    with torch.no_grad():
        for a, b in zip(model.graph(*model.example), again.graph(*model.example), strict=True):
            torch.testing.assert_close(a, b)
    assert sparsify.verify(folder).ok


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_routers_and_units(name: str, pipeline: str) -> None:
    model = copy.deepcopy(works(name, pipeline))
    model.set_active(0.6)
    outputs = model.graph(*model.example)
    sum(o.double().square().sum() for o in outputs if o.is_floating_point()).backward()
    routers = {m for m in model.modules() if isinstance(m, Router | DepthRouter)}
    assert routers or any(isinstance(m, Budgeted) for m in model.modules())
    # copies start equal: with weights that sum to one, no router changes the output yet
    routers -= {m.router for m in model.modules() if isinstance(m, RoutedFFN) and m.copies}
    for router in routers:
        assert router.weight.grad is not None and float(router.weight.grad.abs().sum()) > 0
    for path, parameter in model.named_parameters():
        if any(m.sparse == path for step in model.report.steps for m in step.weights):
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, path


@pytest.mark.parametrize("name", MODELS)
def test_call_signature_is_kept(name: str) -> None:
    made = zoo.build(name)
    model = compiled(name, "ffn-moe,attn-moh")
    if made.example is None:
        ids = torch.randint(3, 120, (2, 9))
        with torch.no_grad():
            dense, routed = made.model(input_ids=ids), model(input_ids=ids)
        assert isinstance(model, type(made.model))
    else:
        args, kwargs = made.example
        with torch.no_grad():
            dense, routed = made.model(*args, **kwargs), model(*args, **kwargs)
    assert type(routed) is type(dense)
    one = [t for t in _pytree.tree_leaves(dense) if isinstance(t, torch.Tensor)]
    two = [t for t in _pytree.tree_leaves(routed) if isinstance(t, torch.Tensor)]
    for a, b in zip(one, two, strict=False):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_sequences_do_not_mix(name: str) -> None:
    """Routed, every sequence of a batch gives what it gives alone."""
    model = compiled(name, "ffn-moe,attn-moh")
    made = zoo.build(name)
    args, kwargs = made.example or ((), {"input_ids": torch.arange(3, 21).view(2, 9)})
    size = next(t.shape[0] for t in _pytree.tree_leaves((args, kwargs)))

    def first(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == size
        return value[:1] if batched else value

    model.set_active(0.5)
    try:
        with torch.no_grad():
            whole = model(*args, **kwargs)
            one = model(*_pytree.tree_map(first, args), **_pytree.tree_map(first, kwargs))
    finally:
        model.set_active(1.0)
    pairs = zip(_pytree.tree_leaves(whole), _pytree.tree_leaves(one), strict=True)
    compared = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.shape[0] == size]
    assert compared
    for a, b in compared:
        torch.testing.assert_close(a[:1], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_calibrated(name: str) -> None:
    cap = captured(name)
    batches = tokens_of(cap, name)
    if batches is None:
        pytest.skip("calibration text is for causal language models")
    model = sparsify.compile(cap, "ffn-moe,attn-moh", calibration=batches, reproducer=None)
    assert worst_relative(model) <= 1e-5
    assert all(r.rule == "threshold" for r in model.modules() if isinstance(r, Router))
    model.set_active(0.75)
    model.reset_counters()
    with torch.no_grad():
        model(input_ids=torch.cat(batches))
    live = list(model.realised().values())
    assert abs(sum(live) / len(live) - 0.75) < 0.05  # the calibration tokens themselves
