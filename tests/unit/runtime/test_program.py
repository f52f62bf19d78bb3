"""Straight-line programs."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

from sparsify.errors import BadCheckpoint
from sparsify.runtime.program import Program, Ref, Step
from tests.unit.runtime.examples import SILU

NESTED = Program(
    ("x", "y"),
    (
        Step("both", "aten.cat.default", ([Ref("x"), Ref("y")], -1)),
        Step("parts", "aten.split.Tensor", (Ref("both"), 2), {"dim": -1}),
        Step("first", "operator.getitem", (Ref("parts"), 0)),
        Step("soft", "aten.softmax.int", (Ref("first"), -1), {"dtype": torch.float32}),
        Step("back", "aten.to.dtype", (Ref("soft"), torch.float32)),
    ),
    "back",
)


def test_it_runs() -> None:
    up, gate = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(SILU(up, gate), torch.nn.functional.silu(gate) * up)
    x = torch.randn(2)
    assert torch.equal(NESTED(x, x), x.softmax(-1))
    assert Program.identity()(x) is x
    with pytest.raises(TypeError, match="called with 1"):
        SILU(up)


@pytest.mark.parametrize("program", [SILU, NESTED, Program.identity()])
def test_copies(program: Program) -> None:
    program(*[torch.randn(2)] * len(program.inputs))
    text = json.dumps(program.to_json(), allow_nan=False)
    assert Program.from_json(json.loads(text)) == program
    assert copy.deepcopy(program) == program
    assert pickle.loads(pickle.dumps(program)) == program


def test_wide_programs_stay_in_float64() -> None:
    x = torch.randn(2, dtype=torch.float64)
    wide = dataclasses.replace(NESTED, wide=True)
    assert torch.equal(wide(x, x), x.softmax(-1))
    assert Program.from_json(wide.to_json()) == wide
    assert NESTED(x.half(), x.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "output", "message"),
    [
        ([["a", "aten.neg.default", {"$tuple": [{"$ref": "b"}]}, {"$dict": {}}]], "a", "'b' befo"),
        ([["x", "aten.neg.default", {"$tuple": [{"$ref": "x"}]}, {"$dict": {}}]], "x", "twice"),
        ([], "y", "not defined"),
        ([["a", "os.system", {"$tuple": ["ls"]}, {"$dict": {}}]], "a", "os.system"),
        ([["a"]], "a", "cannot be read"),
        (None, "a", "cannot be read"),
    ],
)
def test_malformed(steps: Any, output: str, message: str) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        Program.from_json({"inputs": ["x"], "steps": steps, "output": output})
    assert message in str(caught.value)
