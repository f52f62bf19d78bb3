"""Callers' arguments become flat inputs, or an error that says which argument is not covered."""

from __future__ import annotations

import json

import pytest
import torch

from sparsify.errors import BadCheckpoint, NotCaptured
from sparsify.runtime.calling import CausalCall, ModuleCall, Slot, call_from_json, mask_positions

TENSOR = {"kind": "tensor"}
MODULE = ModuleCall(
    (Slot("x", (None, 4), (8, None), True), Slot("ids", (2,))),
    ("x", "ids", "flag", "unused"),
    {"x": TENSOR, "ids": TENSOR, "flag": {"kind": "value", "value": True}},
    TENSOR,
    "Toy",
)
CAUSAL = CausalCall(
    (
        Slot("input_ids", (None, None), (None, None)),
        Slot("attention_mask", (None, None)),
        Slot("position_ids", (None, None)),
        Slot("past_key_values_0_key", (None, 2, None, 8), (), True),
        Slot("past_key_values_0_value", (None, 2, None, 6), (), True),
    ),
    "mask-cumsum",
    True,
    ((2, 8, 6),),
    50,
)
X, IDS = torch.randn(3, 4), torch.tensor([1, 2])


def test_positional_and_keyword_arguments_are_the_same() -> None:
    for args, kwargs in (((X, IDS), {}), ((X,), {"ids": IDS}), ((), {"ids": IDS, "x": X})):
        x, ids = MODULE.flatten(args, kwargs)
        assert x is X
        assert ids is IDS
    assert len(MODULE.flatten((X, IDS, True, None), {})) == 2


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X,), {}, "needs 'ids'"),
        ((X, IDS, False), {}, "'flag' is False, the graph was captured with True"),
        ((X, IDS), {"unused": 3}, "without 'unused'"),
        ((X, IDS), {"flog": 3}, "did you mean 'flag'"),
        ((X, IDS), {"x": X}, "given twice"),
        ((X, IDS, True, None, 1), {}, "takes 4 arguments"),
        ((torch.randn(3, 5), IDS), {}, r"shape \(3, 5\), the graph covers \(any, 4\)"),
        ((torch.randn(9, 4), IDS), {}, "size 9 in dimension 0; the graph covers 8"),
        ((X[0], IDS), {}, "the graph covers"),
        ((X.long(), IDS), {}, "must be floating point"),
        ((X, IDS.float()), {}, "must be integer"),
        (([X], IDS), {}, "laid out otherwise"),
        ((object(), IDS), {}, "a value of type object"),
    ],
)
def test_what_is_not_covered_is_named(args: tuple, kwargs: dict, says: str) -> None:
    with pytest.raises(NotCaptured, match=says):
        MODULE.flatten(args, kwargs)


def test_defaults_of_a_causal_call() -> None:
    ids = torch.ones(3, 5, dtype=torch.int64)
    flat = CAUSAL.flatten((ids,), {})
    assert flat[1].shape == (3, 5)
    assert flat[2].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert flat[3].shape == (3, 2, 0, 8)
    past = [(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 6))]
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :2] = 0
    flat = CAUSAL.flatten((ids,), {"attention_mask": mask, "past_key_values": past})
    assert flat[2].tolist() == [[2, 3, 4, 5, 6]] + [[4, 5, 6, 7, 8]] * 2


def test_one_row_of_positions_serves_the_batch() -> None:
    ids = torch.ones(3, 2, dtype=torch.int64)
    flat = CAUSAL.flatten((ids,), {"position_ids": torch.tensor([[4, 5]])})
    assert flat[2].shape == (3, 2)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"input_ids": torch.ones(3)}, r"input_ids must be \(batch, tokens\)"),
        ({}, "input_ids are missing"),
        ({"input_ids": IDS[None], "odd": 1}, "not odd"),
        ({"input_ids": IDS[None], "attention_mask": torch.ones(1, 3)}, r"needed is .* = \(1, 2\)"),
        ({"input_ids": IDS[None], "past_key_values": []}, "the cache has 0 layers, the graph 1"),
        (
            {
                "input_ids": IDS[None],
                "past_key_values": [(torch.zeros(1, 3, 0, 8), torch.zeros(1, 3, 0, 6))],
            },
            "past_key_values_0_key",
        ),
    ],
)
def test_causal_calls_that_are_not_covered(kwargs: dict, says: str) -> None:
    with pytest.raises(NotCaptured, match=says):
        CAUSAL.flatten((), kwargs)


def test_positions_count_unmasked_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert mask_positions(mask, 1).tolist() == [[1, 1, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("call", [MODULE, CAUSAL])
def test_calls_go_through_json(call: ModuleCall | CausalCall) -> None:
    assert call_from_json(json.loads(json.dumps(call.to_json()))) == call


@pytest.mark.parametrize("change", [{"kind": "odd"}, {"slots": [{}]}, {"surprise": 1}])
def test_malformed_calls_are_refused(change: dict) -> None:
    with pytest.raises(BadCheckpoint):
        call_from_json({**MODULE.to_json(), **change})


def test_variadic_arguments() -> None:
    tree = {"kind": "tuple", "items": [TENSOR, TENSOR]}
    slots = (Slot("x_0", (None,), (), True), Slot("x_1", (None,), (), True))
    call = ModuleCall(slots, ("*x", "**rest"), {"x": tree}, TENSOR)
    assert len(call.flatten((torch.ones(2), torch.ones(3)), {})) == 2
    with pytest.raises(NotCaptured, match="laid out otherwise"):
        call.flatten((torch.ones(2),), {})
