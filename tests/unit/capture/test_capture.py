"""Capture: equal to the model, with its names and weights; the model's own state is untouched.

A few models of each kind are enough here: the contract tests capture the whole zoo.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify import zoo
from sparsify.capture import capture
from sparsify.errors import BadInput, BadWeights, CaptureFailed, ModelNotFound, ModelUnreadable

transformers = pytest.importorskip("transformers")


def built(name: str) -> zoo.ZooModel:
    for need in zoo.needs(name):
        pytest.importorskip(need)
    return zoo.build(name)


MODELS = ("gemma2", "gpt2", "bert", "vit", "t5", "transformer-encoder-postnorm", "nanogpt")


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_equals_the_model_and_keeps_its_names(name: str) -> None:
    made = built(name)
    state = copy.deepcopy(made.model.state_dict())
    flags = [m.training for m in made.model.modules()]
    captured = capture(made.model, made.example)
    with torch.no_grad():
        outputs = captured.graph(*captured.example)
    for mine, dense in zip(outputs, captured.golden, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-6)
    own = dict(made.model.named_parameters(remove_duplicate=False))
    for path, parameter in captured.graph.named_parameters(remove_duplicate=False):
        assert own[path] is parameter  # shared, under the model's own name
    assert [m.training for m in made.model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in made.model.state_dict().items())
    targets = {str(n.target) for n in captured.graph.graph.nodes if n.op == "call_function"}
    assert not any("assert" in t or "wrap_with" in t or "dropout" in t for t in targets)
    where = [n.meta.get("stack_trace", "") for n in captured.graph.graph.nodes]
    assert not any("sparsify/capture" in trace for trace in where)
    paths = {
        path
        for n in captured.graph.graph.nodes
        for path, _ in n.meta.get("nn_module_stack", {}).values()
    }
    modules = dict(made.model.named_modules())
    assert paths - {""} <= modules.keys() | {p.partition("@")[0] for p in modules}


@pytest.mark.parametrize(("name", "rule"), [("llama", "arange"), ("opt", "mask-cumsum")])
def test_causal_graphs_take_any_batch_length_and_cache(name: str, rule: str) -> None:
    made = built(name)
    captured = capture(made.model)
    assert captured.kind == "causal-lm"
    assert captured.call.positions == rule
    assert all(d[0] for d in captured.dynamic)
    call = captured.call
    ids = torch.randint(3, 50, (3, 6))
    dense = made.model(input_ids=ids).logits
    logits, *cache = captured.graph(*call.flatten((ids[:, :4],), {}))
    torch.testing.assert_close(logits, dense[:, :4])
    pairs = list(zip(cache[::2], cache[1::2], strict=True))
    kwargs = {"input_ids": ids[:, 4:5], "past_key_values": pairs}  # one token, on a cache
    logits, *cache = captured.graph(*call.flatten((), kwargs))
    torch.testing.assert_close(logits, dense[:, 4:5])


def test_tied_weights_keep_both_names_and_one_parameter() -> None:
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=32,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    graph = capture(model).graph
    assert graph.transformer.wte.weight is graph.lm_head.weight is model.lm_head.weight
    readers = {str(n.target): n for n in graph.graph.nodes if n.op == "get_attr"}
    users = {name: {str(u.target) for u in node.users} for name, node in readers.items()}
    assert users["transformer.wte.weight"] == {"aten.embedding.default"}
    assert users["lm_head.weight"] == {"aten.linear.default"}


def test_share_false_copies_the_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    captured = capture(model, torch.randn(2, 4), share=False)
    assert captured.graph.get_parameter("0.weight") is not model[0].weight
    assert not captured.shared


def test_training_flags_and_gradients_settings_come_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    model[0].eval()
    model[2].weight.requires_grad_(False)
    capture(model, torch.randn(2, 4))
    assert [m.training for m in model] == [False, True, True]
    assert not model[2].weight.requires_grad


def test_structures_of_arguments_and_results_are_kept() -> None:
    class Odd(nn.Module):
        def forward(self, x, pair, *, scale=2.0, extra=None):
            return {"a": (x * scale, pair[0]), "b": [pair[1]["k"] + x], "n": None}

    x = torch.randn(2, 3)
    example = ((x, (x + 1, {"k": x + 2})), {"scale": 3.0})
    captured = capture(Odd(), example)
    flat = captured.call.flatten((x, (x, {"k": x})), {"scale": 3.0})
    result = captured.call.unflatten(captured.graph(*flat))
    assert torch.equal(result["a"][0], x * 3)
    assert result["n"] is None
    assert isinstance(result["a"], tuple)
    assert isinstance(result["b"], list)
    names = [n.target for n in captured.graph.graph.nodes if n.op == "placeholder"]
    assert names == ["x", "pair_0", "pair_1_k"]


def test_a_batch_of_one_is_widened() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    captured = capture(model, torch.randn(1, 4))
    assert captured.dynamic == ((True, False),)
    assert captured.example[0].shape[0] == 2
    assert not captured.notes


def test_a_batch_that_must_be_one_is_noted() -> None:
    class One(nn.Module):
        def forward(self, x):
            return x.view(1, 6) * 2

    captured = capture(One(), torch.randn(1, 6))
    assert captured.call.slots[0].shape == (1, 6)
    assert any("batch" in note for note in captured.notes)


def test_sizes_that_the_model_fixes_are_noted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 8))

        def forward(self, ids):
            return self.table * nn.functional.one_hot(ids, 8).float()

    captured = capture(Fixed(), torch.randint(0, 8, (2, 5)))
    assert captured.call.slots[0].shape == (None, 5)
    assert any("fixed at 5" in note for note in captured.notes)


def test_graph_modules_and_exported_programs_are_taken(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 4)
    traced = capture(torch.fx.symbolic_trace(model), x)
    assert set(traced.graph.state_dict()) == set(model.state_dict())
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    ready = capture(program)
    assert set(ready.graph.state_dict()) == set(model.state_dict())
    assert ready.dynamic == ((True, False),)
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = capture(str(tmp_path / "m.pt2"))
    wide = torch.randn(5, 4)
    flat = loaded.call.flatten((wide,), {})
    torch.testing.assert_close(loaded.call.unflatten(loaded.graph(*flat)), model(wide))


def test_damaged_and_missing_programs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        capture(tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ModelUnreadable, match="not a readable exported program"):
        capture(tmp_path / "bad.pt2")


def test_bad_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(BadWeights, match=r"1\.weight"):
        capture(model, torch.randn(2, 4))


def test_what_cannot_be_captured_is_said() -> None:
    with pytest.raises(BadInput, match="cannot be captured"):
        capture(object())
    with pytest.raises(CaptureFailed, match="needs an example"):
        capture(nn.Linear(2, 2))
    with pytest.raises(CaptureFailed, match="meta device"):
        capture(nn.Linear(2, 2, device="meta"), torch.randn(2, 2))
    with pytest.raises(BadInput, match="an example cannot be a str"):
        capture(nn.Linear(2, 2), "text")


def test_a_user_of_the_example_with_foreign_ids_is_told() -> None:
    model = built("llama").model
    with pytest.raises(CaptureFailed, match="the vocabulary has"):
        capture(model, torch.full((1, 8), 10**6))
    captured = capture(model, {"input_ids": torch.randint(3, 50, (1, 2))})  # too short, batch 1
    assert captured.example[0].shape[0] == 2


def test_capture_is_quiet_and_leaves_the_random_state() -> None:
    made = built("nanogpt")
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(made.model, made.example)
    assert torch.equal(torch.random.get_rng_state(), state)
