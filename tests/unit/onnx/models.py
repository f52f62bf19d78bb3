"""Models that several tests export: compiled and translated once a worker."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest

import sparsify
from sparsify.codegen.cpu import build
from sparsify.codegen.onnx import trace, translate
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
