"""Every pass on every zoo model: what an exported file computes, before it is one.

The forms (:mod:`sparsify.codegen.onnx.forms`) run in torch here, which takes milliseconds; that
translation keeps what they compute is held on a sample in tests/unit/onnx, and on all of these by
``python benchmarks/onnx_matrix.py``.
"""

from __future__ import annotations

import pytest
import torch

from sparsify.codegen.onnx.trace import formed
from sparsify.codegen.onnx.trial_calls import cases, counted
from sparsify.errors import BadInput
from sparsify.evidence import error_between
from sparsify.runtime.ffn import RoutedFFN
from tests.contract.test_contract import PASSES, works
from tests.contract.zoo_captures import MODELS

WAYS = ((0.5, "branch"), (0.5, "moe"))  # of routed feed-forward layers


def ways(model: torch.nn.Module) -> tuple[tuple[float, str], ...]:
    return WAYS if any(isinstance(m, RoutedFFN) for m in model.modules()) else ()


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_forms_compute_what_eager_computes(name: str, pipeline: str) -> None:
    model = works(name, pipeline)
    try:
        for active, way in ((1.0, "mask"), (0.5, "mask"), *ways(model)):
            model.set_active(active)
            graph = formed(model, way)
            for case, flat in cases(model)[:: 1 if (active, way) == (0.5, "mask") else 3]:
                with torch.no_grad():
                    both = (graph.forward(*flat), model.graph(*flat))
                pairs = zip(*(counted(model, flat, outputs) for outputs in both), strict=True)
                errors = [error_between(a, b) for a, b in pairs]
                worst = max(error / max(scale, 1e-30) for error, scale in errors)
                assert worst <= 1e-5, f"{active:g} active, {way}, {case}"
    except BadInput as error:
        pytest.skip(f"the dial does not turn: {error.what}")
    finally:
        model.set_active(1.0)
