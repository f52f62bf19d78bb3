"""Structures of tensors through JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.runtime.trees import Record, UnknownStructure, count, describe, leaf_names, rebuild

Pair = collections.namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: Any = None


structures = st.recursive(
    st.just("TENSOR") | st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def fill(value: Any) -> Any:
    if value == "TENSOR":
        return torch.ones(1)
    if isinstance(value, list | tuple):
        return type(value)(fill(v) for v in value)
    return {k: fill(v) for k, v in value.items()} if isinstance(value, dict) else value


@given(structures)
def test_any_structure_comes_back(shape: Any) -> None:
    value = fill(shape)
    leaves: list[torch.Tensor] = []
    tree = json.loads(json.dumps(describe(value, leaves)))
    assert count(tree) == len(leaves) == len(leaf_names(tree, "x"))
    again: list[torch.Tensor] = []
    assert describe(rebuild(tree, leaves), again) == tree
    assert all(a is b for a, b in zip(leaves, again, strict=True))


def test_records_keep_their_class_here_and_read_alike_elsewhere() -> None:
    x = torch.ones(2)
    for value in (Pair(x, None), Out(x)):
        leaves: list[torch.Tensor] = []
        tree = describe(value, leaves)
        assert type(rebuild(tree, leaves)) is type(value)
    foreign = {"kind": "record", "class": "somewhere:Out", "items": {"logits": {"kind": "tensor"}}}
    stand_in = rebuild(foreign, [x])
    assert isinstance(stand_in, Record)
    assert stand_in.logits is x
    assert stand_in.to_tuple() == (x,)
    with pytest.raises(AttributeError):
        stand_in.nothing  # noqa: B018


@pytest.mark.parametrize("path", ["subprocess:Popen", "os:system", "transformers:pipeline", "x"])
def test_a_file_cannot_name_code(path: str) -> None:
    tree = {"kind": "record", "class": path, "items": {"args": {"kind": "value", "value": "id"}}}
    assert type(rebuild(tree, [])) is Record


def test_other_objects_are_refused_with_their_place() -> None:
    with pytest.raises(UnknownStructure, match=r"object at 'a\.1'"):
        describe({"a": [1, object()]}, [])
