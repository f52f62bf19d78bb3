"""Every pass on every zoo model: what an exported file computes, before it is one.

The forms (:mod:`sparsify.codegen.onnx.forms`) run in torch here, which takes milliseconds; that
translation keeps what they compute is held on a sample in tests/unit/onnx, and on all of these by
``python benchmarks/onnx_matrix.py``.
"""

from __future__ import annotations

import pytest
import torch

from sparsify.codegen.onnx.parity import cases, counted
from sparsify.codegen.onnx.trace import formed
from sparsify.errors import BadInput
from sparsify.evidence import error_between
from tests.contract.test_contract import PASSES, works
from tests.contract.zoo_captures import MODELS


@pytest.mark.parametrize("pipeline", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_forms_compute_what_eager_computes(name: str, pipeline: str) -> None:
    model = works(name, pipeline)
    try:
        for active in (1.0, 0.5):
            model.set_active(active)
            graph = formed(model)
            for case, flat in cases(model):
                with torch.no_grad():
                    both = (graph.forward(*flat), model.graph(*flat))
                pairs = zip(*(counted(model, flat, outputs) for outputs in both), strict=True)
                errors = [error_between(a, b) for a, b in pairs]
                worst = max(error / max(scale, 1e-30) for error, scale in errors)
                assert worst <= 1e-5, f"{active:g} active, {case}"
    except BadInput as error:
        pytest.skip(f"the dial does not turn: {error.what}")
    finally:
        model.set_active(1.0)
