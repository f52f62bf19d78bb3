"""The zoo: every model exports with a dynamic batch, is repeatable, has nothing special in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import zoo
from sparsify.errors import MissingDependency, ModelNotFound

ROOT = Path(__file__).resolve().parents[2]
AUTO = torch.export.Dim.AUTO
FLAT_SEQUENCE = ("bert", "t5", "nanogpt", "transformer-encoder-prenorm",
                 "transformer-encoder-postnorm")  # fmt: skip


def example(built: zoo.ZooModel) -> zoo.Example:
    """The model's example; ids for Hugging Face causal LMs, which have none."""
    if built.example is not None:
        return built.example
    ids = torch.randint(3, zoo.VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    return (), {"input_ids": ids, "use_cache": False}


def first(outputs: Any) -> Tensor:
    return next(t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor))


@pytest.fixture(params=zoo.names())
def built(request: pytest.FixtureRequest) -> zoo.ZooModel:
    for need in zoo.needs(request.param):
        pytest.importorskip(need)
    return zoo.build(request.param)


def test_runs_and_is_not_degenerate(built: zoo.ZooModel) -> None:
    args, kwargs = example(built)
    with torch.no_grad():
        out = first(built.model(*args, **kwargs))
    assert out.shape[0] == 2
    assert out.isfinite().all()
    assert 0.05 < float(out.std()) < 50
    assert not torch.equal(out[0], out[1])
    assert not built.model.training


def test_biases_and_gains_are_not_special(built: zoo.ZooModel) -> None:
    for name, parameter in built.model.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter.requires_grad and parameter.numel() > 1:
            assert float(parameter.detach().std()) > 1e-3, f"{name} is constant"


def test_same_weights_every_time_and_global_seed_untouched() -> None:
    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = zoo.build("nanogpt"), zoo.build("nanogpt"), zoo.build("nanogpt", seed=1)
    assert torch.equal(torch.rand(1), before)
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


@pytest.mark.slow
def test_exports_with_a_dynamic_batch(built: zoo.ZooModel) -> None:
    args, kwargs = example(built)

    def dims(value: Any) -> Any:
        tokens = built.example is None or built.name in FLAT_SEQUENCE
        if not isinstance(value, Tensor):
            return None
        return {0: AUTO, 1: AUTO} if tokens else {0: AUTO}

    shapes: Any = {k: dims(v) for k, v in kwargs.items()} or tuple(dims(a) for a in args)
    program = torch.export.export(built.model, args, kwargs, dynamic_shapes=shapes, strict=False)
    again = program.module()
    wider = [torch.cat([a, a[:1]]) if isinstance(a, Tensor) else a for a in args]
    wider_kwargs = {
        k: torch.cat([v, v[:1]]) if isinstance(v, Tensor) else v for k, v in kwargs.items()
    }
    with torch.no_grad():
        expected = first(built.model(*wider, **wider_kwargs))
        found = first(again(*wider, **wider_kwargs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(ModelNotFound) as caught:
        zoo.build("lama")
    assert "did you mean 'llama'?" in str(caught.value)
    assert "nanogpt" in str(caught.value)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install diffusers"):
        zoo.build("dit")


def test_importing_the_zoo_loads_no_torch() -> None:
    code = "import sys, sparsify.zoo as z; z.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
