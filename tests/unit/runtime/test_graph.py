"""Graphs through JSON, copies and moves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from sparsify.errors import BadCheckpoint
from sparsify.runtime.graph import assemble, attach, clone, graph_from_json, graph_to_json, retarget
from tests.unit.runtime.small import causal, routed

aten = torch.ops.aten


def test_a_graph_goes_through_json_exactly() -> None:
    model = causal()
    data = json.loads(json.dumps(graph_to_json(model.graph)))
    again = graph_from_json(data, model.graph)
    assert again.code == model.graph.code
    for mine, theirs in zip(again(*model.example), model.golden, strict=True):
        assert torch.equal(mine, theirs)
    assert again.meta["dtype"] is torch.float32


def damaged(change: Callable[[dict[str, Any]], None]) -> None:
    model = causal()
    data = json.loads(json.dumps(graph_to_json(model.graph)))
    change(data)
    with pytest.raises(BadCheckpoint):
        graph_from_json(data, model.graph)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "aten.__and__.Tensor", "aten.nothing.default", "aten", 3],
)
def test_foreign_operations_are_refused(target: object) -> None:
    def change(data: dict[str, Any]) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "call_function")
        node["target"] = target

    damaged(change)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "x = __import__('os')"),
        ("op", "call_method"),
        ("args", [{"$ref": "nothing"}]),
        ("args", [{"$unknown": 1}]),
        ("kwargs", {"a=1); print(": 1}),
    ],
)
def test_malformed_nodes_are_refused(key: str, value: object) -> None:
    def change(data: dict[str, Any]) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "call_function")
        node[key] = value

    damaged(change)


@pytest.mark.parametrize("path", ["embed.__class__", 'a"); print("', "", "a b"])
def test_paths_cannot_leave_the_model(path: str) -> None:
    def change(data: dict[str, Any]) -> None:
        node = next(n for n in data["nodes"] if n["op"] == "get_attr")
        node["target"] = path

    damaged(change)


def test_missing_pieces_are_refused() -> None:
    damaged(lambda data: data.pop("nodes"))
    damaged(lambda data: data["nodes"].pop(0))
    damaged(lambda data: data.update(dtype={"$dtype": "nothing"}))


def test_a_clone_shares_nothing_and_keeps_ties_and_flags() -> None:
    tied = causal().graph
    twin = clone(tied)
    assert twin.embed.weight is twin.head.weight
    assert twin.embed.weight is not tied.embed.weight
    other = routed().graph
    copied = clone(other)
    assert copied.state_dict().keys() == other.state_dict().keys()
    assert "shift" not in copied.state_dict()
    x = torch.randn(2, 12)
    assert torch.equal(copied(x)[0], other(x)[0])


def test_copy_deepcopy_of_the_graph_module_also_works() -> None:
    model = causal()
    twin = copy.deepcopy(model.graph)
    assert torch.equal(twin(*model.example)[0], model.golden[0])


def positions_graph() -> fx.GraphModule:
    """``(arange(3, float32) + to(ids, float32)) * weight``, made on the CPU."""
    root = nn.Module()
    attach(root, "w", nn.Parameter(torch.ones(3)))
    graph = fx.Graph()
    ids = graph.placeholder("ids")
    steps = graph.call_function(
        aten.arange.default, (3,), {"dtype": torch.float32, "device": torch.device("cpu")}
    )
    floats = graph.call_function(aten.to.dtype, (ids, torch.float32))
    total = graph.call_function(aten.add.Tensor, (steps, floats))
    graph.output((graph.call_function(aten.mul.Tensor, (total, graph.get_attr("w"))),))
    module = assemble(graph, root)
    module.meta["dtype"] = torch.float32
    return module


def test_named_dtypes_and_devices_follow_the_model_and_come_back() -> None:
    module = positions_graph()
    code = module.code
    ids = torch.ones(2, 3, dtype=torch.int64)
    module.double()
    retarget(module, dtype=torch.float64)
    assert module(ids)[0].dtype is torch.float64
    assert "float32" not in module.code
    module.to("meta")
    retarget(module, device=torch.device("meta"))
    assert module(ids.to("meta"))[0].device.type == "meta"
    retarget(module, dtype=torch.float32, device=torch.device("cpu"))
    assert module.code == code


def test_upcasts_of_a_narrow_model_stay() -> None:
    module = positions_graph()
    module.meta["dtype"] = torch.bfloat16  # then float32 is an upcast that the model meant
    retarget(module, dtype=torch.float16)
    assert "float32" in module.code
