"""The straight function of a graph: the same bits, nothing run for nothing, and no stale parts."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import zoo
from sparsify.capture import Capture, capture
from sparsify.runtime.bound import unusual
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.model import SparseModel
from sparsify.runtime.straight_text import DIRECT, function
from tests.unit.runtime.small import routed

_CAPTURED: dict[str, Capture] = {}


def model(name: str = "llama") -> SparseModel:
    pytest.importorskip("transformers")
    if name not in _CAPTURED:
        _CAPTURED[name] = capture(zoo.build(name).model)
    captured = _CAPTURED[name]
    return copy.deepcopy(SparseModel.of(captured))


def calls(
    sparse: SparseModel, batch: int, past: int, new: int, padding: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Flat inputs with a filled cache, and the padding mask."""
    call = sparse.call_spec
    assert isinstance(call, CausalCall)
    g = torch.Generator().manual_seed(batch + past)
    ids = torch.randint(4, call.vocabulary, (batch, past + new), generator=g)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    cache = None
    if past:
        first = call.inputs(ids[:, :past], mask[:, :past], dtype=sparse.dtype)
        _, cache = call.unflatten(sparse.graph.forward(*first))
    return call.inputs(ids[:, past:], mask, None, cache, dtype=sparse.dtype), mask


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("batch", "past", "new", "padding"),
    [(1, 0, 7, 0), (1, 9, 1, 0), (2, 9, 1, 2), (3, 5, 4, 0), (1, 40, 1, 0)],
)
@torch.no_grad()
def test_every_bit_is_the_graphs(name: str, batch: int, past: int, new: int, padding: int) -> None:
    sparse = model(name)
    flat, _ = calls(sparse, batch, past, new, padding)
    expected = sparse.graph.forward(*flat)
    found = sparse._straight.run(sparse.graph, flat, one=new == 1)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def operations(work: Any) -> dict[str, int]:
    """What torch ran, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {e.key: e.count for e in seen.key_averages()}


@torch.no_grad()
def test_a_decoding_step_copies_no_keys_and_makes_no_masks() -> None:
    sparse = model("llama")
    flat, _ = calls(sparse, 1, 9, 1)
    call = sparse.call_spec
    assert isinstance(call, CausalCall)
    ids, cache = flat[0], call.unflatten([flat[0], *flat[3:]])[1]
    sparse.run_causal(ids, None, None, cache)
    ran = operations(lambda: sparse.run_causal(ids, None, None, cache))
    assert not ran.keys() & {"aten::clone", "aten::where"}  # keys repeated, masks made numbers
    before = operations(lambda: sparse.graph.forward(*flat))
    assert before["aten::clone"] == 4 and before["aten::where"] > 0
    assert ran["aten::scaled_dot_product_attention"] == 2
    assert ran["aten::neg"] == 1 and before["aten::neg"] == 4


def test_what_was_tidied_is_told() -> None:
    done = model("llama").tidied(tokens=1)
    assert done["keys and values read without repeating them"] == 2  # one per layer
    assert done["halves rotated in one operation"] == 4
    assert done["attention masks left out while open"] == 1
    assert "attention masks left out while open" not in model("llama").tidied()
    assert routed().tidied(tokens=1) == routed().tidied()  # tokens are nothing it knows of


@torch.no_grad()
def test_a_window_that_shuts_keys_out_keeps_the_masks() -> None:
    sparse = model("mistral")  # a window of 6 keys
    flat, _ = calls(sparse, 1, 40, 1)
    plan = sparse._straight.plan(sparse.graph, True)
    assert plan.masks is not None and plan.unmasked is not None
    (mask,) = plan.masks(*flat)
    assert not bool(mask.all())
    assert not torch.equal(plan.unmasked(*flat)[0], plan(flat)[0])
    flat, _ = calls(sparse, 1, 2, 1)
    assert bool(plan.masks(*flat)[0].all())


@torch.no_grad()
def test_a_rewritten_graph_is_made_anew() -> None:
    sparse = routed()
    x = sparse.example
    before = sparse(*x)["y"]
    assert torch.equal(before, sparse.golden[0])
    node = next(n for n in sparse.graph.graph.nodes if n.op == "output")
    (result,) = node.all_input_nodes
    with sparse.graph.graph.inserting_before(node):
        twice = sparse.graph.graph.call_function(torch.ops.aten.mul.Tensor, (result, 2.0))
    node.replace_input_with(result, twice)
    sparse.graph.recompile()
    assert torch.equal(sparse(*x)["y"], before * 2)


@torch.no_grad()
def test_weights_and_modules_may_be_replaced() -> None:
    sparse = routed()
    x = sparse.example
    sparse(*x)
    name, weight = next(iter(sparse.named_parameters()))
    owner = sparse.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(torch.zeros_like(weight)))
    assert torch.equal(sparse(*x)["y"], sparse.graph.forward(*x)[0])
    nn.utils.parametrize.register_parametrization(owner, name.rpartition(".")[2], nn.Identity())
    assert torch.equal(sparse(*x)["y"], sparse.graph.forward(*x)[0])


@torch.no_grad()
def test_hooks_are_called_and_kernels_asked_once() -> None:
    sparse = routed()
    path, module = next((p, m) for p, m in sparse.named_modules() if hasattr(m, "kernel"))
    asked = []
    module.kernel = lambda own, *given: asked.append(own)  # declines: eager runs
    sparse(*sparse.example)
    assert asked == [module]
    seen = []
    hook = module.register_forward_hook(lambda *_: seen.append(path))
    assert unusual(module)
    sparse(*sparse.example)
    assert seen == [path]
    hook.remove()
    assert not unusual(module)


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults")
def test_calls_of_the_function_map_no_memory() -> None:
    """However deep the caller is: CPython's frames live in chunks, one of which ends somewhere."""
    import resource

    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    for _ in range(150):
        node = graph.call_function(_through, (node,))
    graph.output((node,))
    run = function(graph, nn.Module())
    most = 0

    def at_depth(depth: int) -> None:
        nonlocal most
        if depth:
            return at_depth(depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(1)
        most = max(most, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return None

    for depth in range(150):
        at_depth(depth)
    assert most < 100  # a fault for every call where frames do not fit


def _through(x: int) -> int:
    return _inner(x)


def _inner(x: int) -> int:
    return x


def test_gradients_traces_and_fakes_take_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = routed()
    monkeypatch.setattr(sparse._straight, "plan", lambda *_: pytest.fail("not plain inference"))
    x = sparse.example
    sparse(*x)["y"].sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sparse(*x)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False):
        sparse(*x)
    with torch.no_grad():
        sparse.requires_grad_(False)
        torch.jit.trace(lambda x: sparse(x)["y"], x, check_trace=False)
        with pytest.raises(pytest.fail.Exception):
            sparse(*x)


@torch.no_grad()
def test_copies_have_functions_of_their_own() -> None:
    sparse = routed()
    sparse(*sparse.example)
    twin = copy.deepcopy(sparse)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(sparse(*sparse.example)["y"], sparse.golden[0])
    assert not torch.equal(twin(*sparse.example)["y"], sparse.golden[0])


@torch.no_grad()
def test_moved_models_run_in_their_dtype() -> None:
    sparse = model("llama").bfloat16()
    flat, _ = calls(sparse, 2, 9, 1, 2)
    expected = sparse.graph.forward(*flat)
    found = sparse._straight.run(sparse.graph, flat, one=True)
    assert found[0].dtype is torch.bfloat16
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_direct_names_call_the_same_overload() -> None:
    """Each is called by torch's parser under the overload's own name."""
    for overload, direct in DIRECT.items():
        name = overload._schema.name.removeprefix("aten::").removeprefix("sym_")
        assert direct.__name__ == name
