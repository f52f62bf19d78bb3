"""SparseModel as a torch module: names, moves, copies, calls, the dial."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sparsify.capture import capture
from sparsify.errors import BadInput, NotCaptured
from sparsify.runtime.lasttokens import last_tokens
from sparsify.runtime.model import SparseModel, next_token_loss
from tests.unit.runtime.small import causal, routed


def test_names_are_the_graphs_own() -> None:
    model = routed()
    assert list(model.state_dict()) == list(model.graph.state_dict())
    assert "shift" not in model.state_dict()
    assert model.get_parameter("first.weight") is model.graph.get_parameter("first.weight")
    assert not any(name.startswith("_graph") for name, _ in model.named_modules())


def test_results_keep_their_structure() -> None:
    model = routed()
    assert torch.equal(model(*model.example)["y"], model.golden[0])
    with pytest.raises(NotCaptured, match=r"covers \(any, 12\)"):
        model(torch.randn(2, 5))


def test_state_goes_in_and_out() -> None:
    model, other = routed(), routed()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*model.example)["y"], model.golden[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_ties_survive_moves_copies_and_loading() -> None:
    model = causal()
    for twin in (copy.deepcopy(model), copy.deepcopy(model).double(), model.bfloat16()):
        assert twin.embed.weight is twin.head.weight
    assert model.num_parameters() == model.embed.weight.numel()
    model.load_state_dict(causal(seed=1).state_dict())
    assert model.embed.weight is model.head.weight


def test_copies_share_nothing() -> None:
    model = routed()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(*model.example)["y"], model.golden[0])
    assert not torch.equal(twin(*model.example)["y"], model.golden[0])
    assert twin.pipeline == model.pipeline


def test_moving_a_borrowing_model_leaves_the_lender_alone() -> None:
    lender = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    sparse = SparseModel.of(capture(lender, torch.randn(2, 4)))
    assert sparse.get_parameter("0.weight") is lender[0].weight
    sparse.to(torch.float32)  # nothing moves: optimizers keep their parameters
    assert sparse.get_parameter("0.weight") is lender[0].weight
    sparse.double()
    assert sparse.dtype is torch.float64
    assert lender[0].weight.dtype is torch.float32
    assert sparse(torch.randn(2, 4).double()).dtype is torch.float64


def test_training_reaches_every_parameter() -> None:
    model = routed()
    model.train()
    assert model.training
    assert model.get_submodule("blocks.0.mlp").training
    model.set_active(0.5)
    model(torch.randn(16, 12))["y"].square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    model.requires_grad_(False)
    assert not model(torch.randn(2, 12))["y"].requires_grad


def test_the_dial_and_the_counters() -> None:
    model = routed()
    assert set(model.active.values()) == {1.0}
    assert model.set_active(0.5) is model
    assert all(a < 1 for a in model.active.values())
    model.reset_counters()
    model(torch.randn(64, 12))
    assert model.realised()
    assert all(0 < share < 1 for share in model.realised().values())
    model.set_active(1.0)
    assert torch.equal(model(*model.example)["y"], model.golden[0])


def test_causal_calls_without_transformers() -> None:
    model = causal()
    ids = torch.randint(0, 20, (2, 6))
    whole = model(ids)
    part = model(ids[:, :4])
    rest = model(ids[:, 4:], past_key_values=part.past_key_values)
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:])
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, logits_to_keep=1).logits.shape[1] == 1
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole.logits[:, [0, 3]]
    )
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, next_token_loss(whole.logits, ids))
    loss.backward()
    assert model.embed.weight.grad is not None


def test_the_head_runs_for_the_kept_tokens_only() -> None:
    model = causal()
    ids = torch.randint(0, 20, (2, 6))
    whole = model(ids)
    for keep in (1, 3):
        kept = model(ids, logits_to_keep=keep)
        torch.testing.assert_close(kept.logits, whole.logits[:, -keep:])
        assert torch.equal(kept.past_key_values[0][0], whole.past_key_values[0][0])
    short = last_tokens(model.graph)
    assert short is not None
    assert short.embed.weight is model.embed.weight
    rows = next(n for n in short.graph.nodes if n.target is torch.ops.aten.linear.default).args[0]
    assert rows.target is torch.ops.aten.slice.Tensor  # before the head, not after it
    twin = copy.deepcopy(model).double()
    assert twin(ids, logits_to_keep=1).logits.dtype is torch.float64
    assert last_tokens(routed().graph) is None


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"inputs_embeds": torch.ones(1, 2, 4)}, "starts from token ids"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "logits only"),
        ({"labls": 1}, "did you mean 'labels'"),
        ({"temperature": 1}, "no argument 'temperature'"),
    ],
)
def test_what_a_causal_graph_does_not_have(kwargs: dict, says: str) -> None:
    with pytest.raises(NotCaptured, match=says):
        causal()(torch.ones(1, 2, dtype=torch.int64), **kwargs)
    causal()(torch.ones(1, 2, dtype=torch.int64), output_attentions=False, cache_position=None)


def test_ids_are_needed() -> None:
    with pytest.raises(NotCaptured, match="input_ids are missing"):
        causal()()


def test_the_loss_skips_ignored_labels() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, 2, -100, 3]])
    expected = nn.functional.cross_entropy(logits[0, [0, 2]], labels[0, [1, 3]])
    torch.testing.assert_close(next_token_loss(logits, labels), expected)


def test_pickling_is_refused_with_the_way_out() -> None:
    with pytest.raises(BadInput, match=r"model\.save"):
        pickle.dumps(causal())


def test_the_repr_is_one_line() -> None:
    assert repr(routed()).count("\n") == 0
    assert "1 routed module" in repr(routed())
