"""Captured zoo models, one capture per model, dtype and worker."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree

from sparsify import zoo
from sparsify.capture import Capture, capture

MODELS = tuple(n for n in zoo.names() if n != "conv")  # conv has nothing to match


def captured(name: str, dtype: torch.dtype = torch.float32) -> Capture:
    """The zoo model's graph (weights shared by all tests of a worker; no test changes them)."""
    return _captured(name, dtype)


@functools.cache
def _captured(name: str, dtype: torch.dtype) -> Capture:
    made = zoo.build(name)
    model = made.model.to(dtype)
    example = _pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v,
        made.example,
    )
    return capture(model, example)


def tokens_of(cap: Capture, name: str) -> Any:
    """Calibration token batches for a causal model, else None."""
    if cap.kind != "causal-lm":
        return None
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 120, (4, 32), generator=generator) for _ in range(8)]
