"""Mixture of shards: the budget of LoRA, more rank, the paper's rules, merging and healing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify import healing
from sparsify.errors import BadInput
from sparsify.healing import heal
from sparsify.runtime import lora, shards
from tests.unit.test_healing import IDS, OPTIONS, Killed, model, state

SHAPES = {"a": (12, 20), "b": (12, 20), "c": (3, 4, 20), "d": (20, 7), "e": (20, 8), "f": (20, 8)}


class Weights(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=g, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(weight))


def adapted(rank: int = 2, count: int = 4) -> tuple[Weights, dict[str, shards.Shards]]:
    module = Weights(SHAPES)
    return module, shards.add(module, list(SHAPES), rank=rank, count=count)


def learnt(module: nn.Module) -> None:
    """Something in the pools of B."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.trained(module).items():
            if name.endswith(".b"):
                parameter.normal_(generator=g)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(module, name).detach().clone() for name in SHAPES}


def test_nothing_at_first_and_merged_bit_for_bit() -> None:
    before = values(Weights(SHAPES))
    module, made = adapted()
    assert list(made) == list(lora.adapters(module)) == list(SHAPES)
    assert all(torch.equal(t, before[n]) for n, t in values(module).items())
    learnt(module)
    changed = values(module)
    assert not any(torch.equal(t, before[n]) for n, t in changed.items())
    with lora.disabled(module):
        assert all(torch.equal(t, before[n]) for n, t in values(module).items())
    twin = copy.deepcopy(module)  # pools stay shared in a copy
    assert len(lora.trained(twin)) == len(lora.trained(module)) == 6
    assert lora.merge(module) == list(SHAPES) and not lora.adapters(module)
    assert all(torch.equal(t, changed[n]) for n, t in values(module).items())
    assert module.state_dict().keys() == before.keys() and type(module) is Weights
    assert lora.remove(twin) == list(SHAPES)
    assert all(torch.equal(t, before[n]) for n, t in values(twin).items())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_numbers_as_lora_and_more_rank(count: int) -> None:
    plain = Weights(SHAPES)
    wanted = sum(a.a.numel() + a.b.numel() for a in lora.add(plain, list(SHAPES), rank=2).values())
    before = values(Weights(SHAPES))
    module, _ = adapted(2, count)
    assert sum(p.numel() for p in lora.trained(module).values()) == wanted
    learnt(module)
    learnt(plain)
    for name, shape in SHAPES.items():
        ranks = [
            int(torch.linalg.matrix_rank((getattr(m, name) - before[name]).view(-1, shape[-1])))
            for m in (plain, module)
        ]
        assert ranks[0] == 2 and ranks[1] >= (2 if name == "d" else 3 if count == 1 else 5)


def test_factors_are_shards_side_by_side() -> None:
    module, made = adapted()
    learnt(module)
    adapter = made["c"]
    assert adapter.at_a.shape == (8, 4) and adapter.at_b.shape == (8, 4)
    assert made["d"].at_a.shape == (7, 1)  # seven columns cannot be cut in two to four
    change = torch.zeros(12, 20, dtype=torch.float64)
    for i in range(8):
        a = torch.cat([adapter.pool.a[int(n)] for n in adapter.at_a[i]])
        b = torch.cat([adapter.pool.b[int(n)] for n in adapter.at_b[i]])
        change += 2 / 8 * torch.outer(b, a)
    original = module.parametrizations["c"].original  # type: ignore[index,union-attr]
    torch.testing.assert_close(module.c - original, change.view(3, 4, 20))


@settings(max_examples=30, deadline=None)
@given(
    weights=st.integers(1, 6), rank=st.integers(1, 9), pieces=st.integers(1, 4), seed=st.integers(0)
)
def test_rules_of_the_indices(weights: int, rank: int, pieces: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    pool = shards.Pool(torch.zeros(24, 48), weights, rank, pieces, generator)
    mixed = 4 * rank
    found = pool.indices(mixed, pieces, generator)
    counts = torch.stack(
        [torch.bincount(at.flatten(), minlength=weights * rank * pieces) for at in found]
    )
    assert counts.sum(1).tolist() == [mixed * pieces] * weights
    private = (rank // 4 or int(rank > 1)) * pieces if weights > 1 else 0
    shared = weights * (rank * pieces - private)
    for weight in range(weights):  # each has shards of its own, once
        own = slice(shared + weight * private, shared + (weight + 1) * private)
        assert bool((counts[weight, own] == 1).all()) and int(counts[:, own].sum()) == private
    used = counts[:, :shared].sum(0)
    assert int(used.max() - used.min()) <= 1 and int(used.min()) >= 1  # none is idle
    assert int(counts[:, :shared].max()) <= -(-(mixed * pieces - private) // shared)
    other = pool.indices(mixed, pieces, generator)
    if mixed * pieces > 8:  # A and B are indexed apart
        assert not all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_gradients_add_up_over_the_weights() -> None:
    module, made = adapted()
    learnt(module)
    pool = made["a"].pool
    assert pool is made["b"].pool is made["c"].pool and pool is not made["d"].pool

    def total(a: Tensor, b: Tensor) -> Tensor:
        parts = [b[m.at_b].flatten(1).T @ a[m.at_a].flatten(1) for m in list(made.values())[:3]]
        return torch.stack([part.sin().sum() for part in parts])

    inputs = [pool.a.detach().requires_grad_(), pool.b.detach().requires_grad_()]
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)
    sum((b @ a).sin().sum() for b, a in (made[n].factors() for n in "abc")).backward()  # type: ignore[union-attr]
    wanted = torch.autograd.grad(total(*inputs).sum(), inputs)
    torch.testing.assert_close([pool.a.grad, pool.b.grad], list(wanted))


def test_what_cannot_be() -> None:
    for options, why in (({"rank": 0}, "rank=0"), ({"count": 0}, "shards=0")):
        with pytest.raises(BadInput, match=why):
            shards.add(Weights(SHAPES), ["a"], **options)
    with pytest.raises(BadInput, match="shards=-1"):
        heal(model(), [IDS], shards=-1, **OPTIONS)


def test_healing_with_shards_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "RATES", {**healing.RATES, "stand-ins": 1e-3})  # as test_healing
    options = {**OPTIONS, "shards": 4, "rank": 2, "rate": 20.0}
    straight, broken = model(), model()
    one = heal(straight, [IDS], **options)
    assert one.improved and one.trained == heal(model(), [IDS], **{**options, "shards": 0}).trained

    def kill(event: str, done: int, total: int) -> None:
        if event == "heal" and done == 6:
            raise Killed

    before = state(broken)
    with pytest.raises(Killed):
        heal(broken, [IDS], checkpoint=tmp_path / "c", progress=kill, **options)
    assert all(torch.equal(t, before[n]) for n, t in state(broken).items())
    heal(broken, [IDS], checkpoint=tmp_path / "c", resume=True, **options)
    mine, theirs = state(straight), state(broken)
    assert mine.keys() == theirs.keys() == before.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert any(n.endswith("moe.up") and not torch.equal(mine[n], before[n]) for n in mine)
