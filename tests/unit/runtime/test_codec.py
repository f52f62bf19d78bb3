"""Values and operations as text."""

from __future__ import annotations

import json
import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import BadCheckpoint, BadInput
from sparsify.runtime.codec import allow_namespace, decode, encode, op_name, resolve

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.complex_numbers(allow_nan=False),
    st.sampled_from([torch.float16, torch.int64, torch.strided, torch.channels_last, ...]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)]),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers()),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.text(), inner),
    ),
)


@given(VALUES)
def test_values_round_trip(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    back = decode(json.loads(text))
    assert back == value
    assert type(back) is type(value)


def test_nan_round_trips() -> None:
    assert math.isnan(decode(encode(float("nan"))))


def test_references() -> None:
    class Node:
        name = "add_1"

    node = Node()
    coded = encode([node, (node, 1)], lambda v: v.name if isinstance(v, Node) else None)
    assert decode(coded, {"add_1": 5}.__getitem__) == [5, (5, 1)]
    with pytest.raises(BadCheckpoint):
        decode(coded)
    with pytest.raises(BadCheckpoint):
        decode(coded, dict[str, int]().__getitem__)


@pytest.mark.parametrize("value", [torch.zeros(2), object(), {1: 2}, {1, 2}])
def test_values_that_cannot_be_stored(value: Any) -> None:
    with pytest.raises(BadInput):
        encode(value)


@pytest.mark.parametrize(
    "obj",
    [
        {"$dtype": "zeros"},
        {"$dtype": "no_such"},
        {"$what": 1},
        {},
        {"a": 1, "b": 2},
        {"$slice": [1]},
        {"$device": "moon"},
        {"$float": "x"},
        object(),
    ],
)
def test_damaged_values(obj: Any) -> None:
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        decode(obj)


@pytest.mark.parametrize(
    "op",
    [
        torch.ops.aten.mul.Tensor,
        torch.ops.aten._safe_softmax.default,
        torch.ops.aten.to.dtype,
        torch.ops.prims.convert_element_type.default,
        operator.getitem,
        operator.floordiv,
        math.ceil,
        torch.sym_max,
        torch.sym_sum,
        max,
    ],
)
def test_operations_round_trip(op: Any) -> None:
    assert resolve(op_name(op)) is op


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "operator.attrgetter",
        "operator.methodcaller",
        "aten.from_file.default",
        "aten.mull.Tensor",
        "aten.mul",
        "aten.mul.Tensor.x",
        "aten.__class__.mro",
        "profiler._record_function_enter.default",
        "",
    ],
)
def test_nothing_else_resolves(name: str) -> None:
    with pytest.raises(BadCheckpoint):
        resolve(name)


@pytest.mark.parametrize("op", [print, torch.relu, torch.nn.functional.silu, sorted])
def test_other_callables_have_no_name(op: Any) -> None:
    with pytest.raises(BadInput, match="cannot be stored"):
        op_name(op)


def test_namespaces_can_be_allowed() -> None:
    with torch.library._scoped_library("sparsify_test_codec", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        op = torch.ops.sparsify_test_codec.twice.default
        with pytest.raises(BadInput) as caught:
            op_name(op)
        assert "allow_namespace('sparsify_test_codec')" in str(caught.value)
        allow_namespace("sparsify_test_codec")
        assert resolve(op_name(op)) is op
