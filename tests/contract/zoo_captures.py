"""Captured and compiled zoo models, one capture per model and worker."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch

import sparsify
from sparsify import zoo
from sparsify.capture import Capture, capture
from sparsify.errors import NothingMatched
from sparsify.evidence import dense_limit, error_between
from sparsify.runtime.graph import clone
from sparsify.runtime.model import SparseModel
from sparsify.runtime.precision import move

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the error at the dense limit
MODELS = tuple(n for n in zoo.names() if n != "conv")  # conv has nothing to match


def captured(name: str, dtype: torch.dtype = torch.float32) -> Capture:
    """The zoo model's graph (weights shared by all tests of a worker; no test changes them)."""
    return _captured(name, dtype)


@functools.cache
def _captured(name: str, dtype: torch.dtype) -> Capture:
    made = zoo.build(name)
    if dtype == torch.float32:
        return capture(made.model, made.example)
    return _moved(_captured(name, torch.float32), dtype)


def _moved(cap: Capture, dtype: torch.dtype) -> Capture:
    """The capture in another dtype, by moving its graph: exporting again takes seconds a model.

    That capturing a model of another dtype gives the same is what tests/unit/capture shows.
    """
    graph = clone(cap.graph)
    example = tuple(t.to(dtype) if t.is_floating_point() else t for t in cap.example)
    graph.to(dtype)
    move(graph, dtype, None, example)
    graph.meta["dtype"] = dtype
    with torch.no_grad():
        golden = graph(*example)
    return dataclasses.replace(cap, graph=graph, example=example, golden=golden, dtype=dtype)


def tokens_of(cap: Capture, name: str) -> Any:
    """Calibration token batches for a causal model, else None."""
    if cap.kind != "causal-lm":
        return None
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 120, (4, 32), generator=generator) for _ in range(8)]


def compiled(name: str, pipeline: str, dtype: torch.dtype = torch.float32) -> Any:
    """One model per worker and group; tests leave it as it was (everything live, no gradients).

    Raises:
        NothingMatched: as compiling did; it is not tried again.
    """
    found = _compiled(name, pipeline, dtype)
    if isinstance(found, NothingMatched):
        raise found
    return found


@functools.cache
def _compiled(name: str, pipeline: str, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return sparsify.compile(captured(name, dtype), pipeline, reproducer=None)
        except NothingMatched as nothing:
            return nothing


def forget() -> None:
    """Drop the compiled models; captures stay, for tests elsewhere use them."""
    _compiled.cache_clear()


def worst_relative(model: SparseModel) -> float:
    """Largest error over the outputs at the dense limit, relative to each output's scale."""
    with torch.no_grad(), dense_limit(model):
        found = model.graph(*model.example)
    pairs = zip(found, model.golden, strict=True)
    errors = [error_between(a, b) for a, b in pairs if b.is_floating_point()]
    return max(error / max(scale, 1e-30) for error, scale in errors)
