"""ffn-bits: which expert gets how many bits, and the pass end to end."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.errors import BadOption
from sparsify.healing_state import Trainee
from sparsify.passes._bits import HALF, allotted, histogram, losses, own_tokens
from sparsify.runtime.codes import WIDTHS
from sparsify.runtime.few_bits import FewBitsFFN
from sparsify.runtime.model import SparseModel
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import captured, tokens_of
from tests.unit.runtime.examples import Dense


def falling(experts: int, seed: int) -> torch.Tensor:
    """(experts, W): losses that fall by about four a bit, from very different starts."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(experts, 1, generator=g).mul(2).exp()
    noise = 0.5 + torch.rand(experts, len(WIDTHS), generator=g)
    return start * 4.0 ** -torch.arange(len(WIDTHS)) * noise


@pytest.mark.parametrize("bits", [2.0, 3.0, 3.5, 4.67, 8.0])
def test_the_programme_is_solved_exactly(bits: float) -> None:
    found = falling(3, 1)
    best = min(
        (sum(float(found[e, WIDTHS.index(w)]) for e, w in enumerate(way)), way)
        for way in itertools.product(WIDTHS, repeat=3)
        if sum(way) <= bits * 3 + 1e-6
    )
    chosen = allotted(found, bits)
    assert sum(chosen) <= bits * 3 + 1e-6
    assert sum(float(found[e, WIDTHS.index(w)]) for e, w in enumerate(chosen)) == best[0]


def test_it_loses_less_than_the_same_for_all() -> None:
    found = falling(64, 0)
    for bits in (3, 4, 6):
        chosen = allotted(found, bits)
        mixed = sum(float(found[e, WIDTHS.index(w)]) for e, w in enumerate(chosen))
        assert mixed < 0.8 * float(found[:, WIDTHS.index(bits)].sum())
        assert sum(chosen) == 64 * bits
    assert histogram((4, 2, 4)) == "1 x 2, 2 x 4 bits"


def test_every_expert_is_judged_by_its_own_tokens() -> None:
    dense = Dense(shared=2, active=1.0)
    module, x = dense.routed(), dense.x(300)
    tokens, often = own_tokens(module, x)
    assert tokens.shape == (6, 128)
    scores = module.router.scores(x).detach()
    for expert in range(4):
        mine = scores[tokens[2 + expert], expert]
        assert float(mine.min()) >= float(scores[:, expert].sort(descending=True).values[127])
    assert (often[:2] == 1).all()
    assert float(often.mean()) == pytest.approx(HALF, abs=0.01)
    assert module.router.active == 1.0


def test_losses_fall_with_bits_and_count_use() -> None:
    dense = Dense(width=16, hidden=48, dtype=torch.float32)
    module, x = dense.routed(), dense.x(200)
    found, importance = losses(module, x, 16)
    assert importance is not None and importance.shape == (6, 16)
    assert (found[:, 1:] < found[:, :-1]).all()
    with torch.no_grad():
        module.router.bias[0] -= 100  # never used
        assert losses(module, x, 16)[0][1].sum() == 0
    plain, nothing = losses(module, None, 16)
    assert nothing is None and (plain[:, 1:] < plain[:, :-1]).all()


def layers(model: SparseModel) -> list[FewBitsFFN]:
    return [m for m in model.modules() if isinstance(m, FewBitsFFN)]


def test_calibrated(tmp_path: Path) -> None:
    cap = captured("llama")
    batches = tokens_of(cap, "llama")
    ids = torch.cat(batches)
    plain = sparsify.compile(cap, "ffn-moe", calibration=batches, reproducer=None)
    model = sparsify.compile(cap, "ffn-bits{bits=4.5}", calibration=batches, reproducer=None)
    (step,) = model.report.steps
    assert layers(model) and model.report.ok
    assert step.after.parameter_bytes < 0.75 * plain.report.steps[0].after.parameter_bytes
    assert step.after.bytes_per_token < 0.75 * plain.report.steps[0].after.bytes_per_token
    assert step.after.flops_per_token == plain.report.steps[0].after.flops_per_token
    for remark in step.remarks:
        assert " bits, " in remark.reason and "a weight off by" in remark.reason
    for layer in layers(model):
        assert sum(layer.bits) <= 4.5 * layer.experts < sum(layer.bits) + 1
        assert len(layer.dropped_at) == 3  # stand-ins were fitted
    assert sparsify.verify(model).ok
    before = dict(cap.graph.named_parameters())
    for name, rounded in dense_weights(model, step.weights).items():
        assert 0 < float((rounded - before[name]).norm() / before[name].norm()) < 0.15
    model.set_active(0.5)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    model.save(tmp_path / "out")
    again = sparsify.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, found)
    assert [layer.bits for layer in layers(again)] == [layer.bits for layer in layers(model)]


def test_more_bits_are_nearer_to_the_dense_model() -> None:
    cap = captured("llama")
    errors = []
    for bits in (2, 4, 8, 16):
        model = sparsify.compile(cap, f"ffn-bits{{bits={bits}}}", reproducer=None)
        claim = model.report.steps[0].evidence[-1]
        errors.append(claim.error)
        assert claim.ok and ("APPROXIMATE" in claim.claim) == (bits < 16)
        assert bool(layers(model)) == (bits < 16)
    assert errors == sorted(errors, reverse=True)


def test_the_same_bits_for_all() -> None:
    model = sparsify.compile("zoo:gpt2", "ffn-bits{bits=3 allot=even group=7}", reproducer=None)
    assert all(set(layer.bits) == {3} for layer in layers(model))
    assert all(layer.width % layer.group == 0 and layer.group <= 7 for layer in layers(model))


@pytest.mark.parametrize("train", ["routers", "all"])
def test_codes_are_not_trained(train: str) -> None:
    model = sparsify.compile("zoo:llama", "ffn-bits{bits=4}", reproducer=None, share=False)
    trained = Trainee.of(model, train, rank=0, seed=0)  # type: ignore[arg-type]
    names = list(trained.parameters)
    assert names and not any(n.endswith(("_codes", "_scales")) for n in names)


@pytest.mark.parametrize("options", ["bits=9", "bits=3.5 allot=even", "bits=1"])
def test_bad_options(options: str) -> None:
    with pytest.raises(BadOption):
        sparsify.compile("zoo:llama", f"ffn-bits{{{options}}}", reproducer=None)
