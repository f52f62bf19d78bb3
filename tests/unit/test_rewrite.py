"""Rewriting leaves the caller's model as it is, shares weights, drops what nothing reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import zoo
from sparsify.api import share_clone
from sparsify.core import Rewrite, Splice
from sparsify.errors import SparsifyBug
from sparsify.evidence import dense_limit
from sparsify.match import find
from sparsify.regions import FeedForward
from sparsify.rewrite import drop_unread, node_count, splice
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import captured

MODELS = ("llama", "gpt2", "nanogpt")
BOTH = "ffn-moe,attn-moh"


def run(made: zoo.ZooModel, model: nn.Module) -> Tensor:
    with torch.no_grad():
        if made.example is None:
            found: Tensor = model(input_ids=torch.arange(3, 21).view(2, 9)).logits
        else:
            args, kwargs = made.example
            found = model(*args, **kwargs)
    return found


# ---------------------------------------------------------------------------- the caller's model


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_model_is_left_as_it_was(name: str) -> None:
    made = zoo.build(name)
    model = made.model
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.requires_grad for k, p in model.named_parameters()}
    identity = {k: id(p) for k, p in model.named_parameters()}
    modules = [(k, type(m), m.training) for k, m in model.named_modules()]
    forward = model.forward
    attributes = set(model.__dict__)
    config = copy.deepcopy(getattr(model, "config", None))
    before = run(made, model.eval())
    model.train()

    sparse = sparsify.compile(model, BOTH, made.example, active=0.5, reproducer=None)
    run(made, sparse)
    sparse.eval()

    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert {k: p.requires_grad for k, p in model.named_parameters()} == grads
    assert {k: id(p) for k, p in model.named_parameters()} == identity
    assert [(k, type(m), m.training) for k, m in model.named_modules()] == modules
    assert model.forward == forward and "forward" not in model.__dict__
    assert set(model.__dict__) == attributes
    assert all(p.grad is None for p in model.parameters())
    if config is not None:
        assert model.config.to_dict() == config.to_dict()
    assert torch.equal(run(made, model.eval()), before)


@pytest.mark.parametrize("share", [True, False], ids=["share", "copy"])
@pytest.mark.parametrize("name", ["gpt2", "nanogpt"])  # with biases, which move unchanged
def test_untouched_weights_are_shared_unless_asked_not_to(name: str, share: bool) -> None:
    made = zoo.build(name)
    sparse = sparsify.compile(
        made.model, BOTH, made.example, share=share, reproducer=None, verify="off"
    )
    places = {p.data_ptr() for p in made.model.parameters()}
    dense = dict(made.model.named_parameters())
    same = [k for k, p in sparse.named_parameters() if k in dense]
    assert same
    for path, parameter in sparse.named_parameters():
        shared = share and path in dense
        assert (parameter.data_ptr() in places) == shared, path
        if path in dense:
            assert torch.equal(parameter, dense[path])


def test_training_the_sparse_model_trains_shared_weights_only() -> None:
    made = zoo.build("gpt2")
    sparse = sparsify.compile(made.model, "ffn-moe", reproducer=None)
    moved = {m.dense for m in sparse.report.steps[0].weights}
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    after = made.model.state_dict()
    for path, _ in made.model.named_parameters():
        changed = not torch.equal(after[path], before[path])
        assert changed == (path not in moved), path


def test_frozen_weights_stay_frozen_where_they_move() -> None:
    made = zoo.build("llama")
    for path, parameter in made.model.named_parameters():
        parameter.requires_grad_(".mlp." not in path)
    sparse = sparsify.compile(made.model, BOTH, reproducer=None)
    for path, parameter in sparse.named_parameters():
        weight = path.rpartition(".")[2] in ("up", "gate", "down")
        assert parameter.requires_grad == (not (".mlp.moe." in path and weight)), path


# ---------------------------------------------------------------------------- what is dropped


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_nothing_reads_are_dropped(name: str) -> None:
    made = zoo.build(name)
    sparse = sparsify.compile(captured(name), BOTH, reproducer=None)
    moved = {m.dense for step in sparse.report.steps for m in step.weights}
    left = dict(sparse.named_parameters())
    assert moved
    assert not moved & set(left)
    read = {str(n.target) for n in sparse.graph.graph.nodes if n.op in ("get_attr", "call_module")}
    for path in left:
        assert any(path == r or path.startswith(f"{r}.") for r in read), path
    routers = sum(p.numel() for k, p in left.items() if ".router." in k)
    assert sum(p.numel() for p in left.values()) == routers + sum(
        p.numel() for p in made.model.parameters()
    )


@pytest.mark.parametrize("name", MODELS)
def test_no_dense_node_is_left_behind(name: str) -> None:
    cap = captured(name)
    sparse = sparsify.compile(cap, BOTH, reproducer=None)
    step = sparse.report.steps[0]
    assert (step.nodes_before, sparse.report.steps[1].nodes_after) == (
        node_count(cap.graph),
        node_count(sparse.graph),
    )
    assert step.nodes_after < step.nodes_before
    for node in sparse.graph.graph.nodes:
        assert node.users or node.op in ("output", "placeholder"), node.format_node()


def test_the_captured_graph_can_be_used_again() -> None:
    cap = captured("llama")
    code, names = cap.graph.code, list(cap.graph.state_dict())
    sparsify.compile(cap, BOTH, reproducer=None)
    assert cap.graph.code == code and list(cap.graph.state_dict()) == names


# ---------------------------------------------------------------------------- provenance, names


def test_new_nodes_say_where_they_come_from() -> None:
    sparse = sparsify.compile(captured("llama"), BOTH, reproducer=None)
    made = [n for n in sparse.graph.graph.nodes if n.op == "call_module"]
    assert len(made) == 2 * (1 + 4)
    for node in made:
        stamp = node.meta["sparsify"]
        assert stamp["pass"] in ("ffn-moe", "attn-moh")
        assert str(node.target).startswith(stamp["region"])
        assert node.meta.get("stack_trace") and node.meta.get("nn_module_stack")


class Taken(nn.Module):
    """Its feed-forward layer holds a module that is called as ffn-moe calls its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.moe = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x + self.down(torch.relu(self.up(x))))
        return out


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return x


@pytest.mark.parametrize(
    ("cls", "targets"), [(Taken, ["moe_2"]), (Twice, ["moe", "moe_2"])], ids=["taken", "twice"]
)
def test_a_taken_name_is_numbered(cls: type[nn.Module], targets: list[str], tmp_path: Any) -> None:
    model, x = cls(), torch.randn(2, 5, 16)
    sparse = sparsify.compile(model, "ffn-moe", x, reproducer=None)
    found = [str(n.target) for n in sparse.graph.graph.nodes if n.op == "call_module"]
    assert found == targets
    with torch.no_grad(), dense_limit(sparse):
        torch.testing.assert_close(sparse(x), model(x))
    maps = sparse.report.steps[0].weights
    for move in maps:
        tensor: Any = sparse
        for part in move.sparse.split("."):
            tensor = getattr(tensor, part)
        assert isinstance(tensor, Tensor) and tensor.numel() > 0
    undone = dense_weights(sparse, maps)
    assert all(torch.equal(v, model.get_parameter(k)) for k, v in undone.items())
    sparse.save(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(sparsify.load(tmp_path / "out")(x), model(x))


# ---------------------------------------------------------------------------- a pass's mistakes


@pytest.mark.parametrize(
    ("inputs", "site", "what"), [(("z",), "ffn", "['z']"), (("x",), "fnn", "'fnn'")]
)
def test_a_pass_that_names_what_is_not_there(inputs: tuple[str, ...], site: str, what: str) -> None:
    cap = captured("llama")
    graph = share_clone(cap.graph)
    found = find(graph, cap.example)
    region = next(r for r in found.regions if isinstance(r, FeedForward))
    rewrite = Rewrite((Splice("new", nn.Identity(), inputs, site),))
    with pytest.raises(SparsifyBug) as caught:
        splice(graph, region, rewrite, "mine", found.regions)
    assert caught.value.what == f"mine names {what}, which FeedForward does not have"
    assert str(region.path) in str(caught.value.where)


def test_drop_unread_keeps_what_is_read() -> None:
    graph = share_clone(captured("gpt2").graph)
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    drop_unread(graph)
    assert set(dict(graph.named_parameters())) <= read
