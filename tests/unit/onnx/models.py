"""Models that several tests export: compiled and translated once a worker."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.codegen.cpu import build
from sparsify.codegen.onnx import parity, trace, translate
from tests.contract.zoo_captures import captured

_translated = translate.translated  # tests replace it


def needs_compiler() -> None:
    """Skips without one."""
    try:
        build.compiler()
    except build.NoCompiler as missing:
        pytest.skip(missing.what)


@functools.cache
def llama() -> Any:
    """zoo:llama, half of its heads and experts active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sparsify.compile(captured("llama"), "ffn-moe,attn-moh", reproducer=None)
    model.set_active(0.5)
    return model


def llama_translated(opset: int) -> Any:
    """A copy of its ``onnx_ir.Model``."""
    return _llama_translated(opset).clone()


@functools.cache
def _llama_translated(opset: int) -> Any:
    model = llama()
    return _translated(trace_of(model), model.call_spec, opset)


_traced = trace.traced


@functools.cache
def trace_of(model: Any) -> Any:
    """The exported program."""
    return _traced(trace.formed(model), model)


def by_the_standard(file: Path, model: Any, flat: Sequence[Tensor]) -> Tensor:
    """The file's first output in the standard's reference implementation: operators in numpy."""
    reference = pytest.importorskip("onnx.reference")
    names = parity.input_names(model.call_spec)
    feed = {name: tensor.numpy() for name, tensor in zip(names, flat, strict=True)}
    return torch.from_numpy(reference.ReferenceEvaluator(str(file)).run(None, feed)[0])


def agrees_by_the_standard(file: Path, model: Any, flat: Sequence[Tensor]) -> bool:
    """Whether that is what the model gives."""
    with torch.no_grad():
        expected = model.graph(*flat)[0]
    found = by_the_standard(file, model, flat)
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
