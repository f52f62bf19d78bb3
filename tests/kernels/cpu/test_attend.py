"""The CPU kernel of decoding attention against eager: heads, masks, layouts, what is not read."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

from sparsify.codegen.cpu.attend import AttendKernel, Score
from sparsify.codegen.lower import lower_module
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program, Ref, Step

pytestmark = pytest.mark.usefixtures("kernels")


def program(mask: str, safe: bool, scale: float = 0.3) -> Program:
    steps = [Step("scaled", "aten.mul.Tensor", (Ref("scores"), scale))]
    if mask == "bool":
        steps.append(Step("dead", "aten.logical_not.default", (Ref("op0"),)))
        fill = (Ref("scaled"), Ref("dead"), -float("inf"))
        steps.append(Step("masked", "aten.masked_fill.Scalar", fill))
    elif mask == "added":
        steps.append(Step("masked", "aten.add.Tensor", (Ref("scaled"), Ref("op0"))))
    op = "aten._safe_softmax.default" if safe else "aten.softmax.int"
    steps.append(Step("live", op, (Ref(steps[-1].name), -1)))
    return Program(("scores",) if mask == "none" else ("scores", "op0"), tuple(steps), "live")


def both(module: RoutedAttend, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    kernel = AttendKernel(module)
    assert kernel(module, *inputs) is not None
    for made in (kernel, None):
        module.kernel = made
        module.counter.reset()
        found.append((module(*inputs), copy.copy(module.counter)))
    (mine, counted), (eager, expected) = found
    assert counted == expected
    assert mine.shape == eager.shape and mine.dtype == eager.dtype
    return mine, eager


def check(rng: random.Random) -> None:
    batch, per, kv = rng.choice([1, 1, 2, 5]), rng.choice([1, 3]), rng.choice([1, 2, 4])
    heads, d, dv = per * kv, rng.choice([1, 8, 17, 64]), rng.choice([3, 16, 64, 72])
    keys = rng.choice([1, 2, 7, 64, 65, 200])
    mask, safe = rng.choice(["none", "bool", "added"]), rng.random() < 0.5
    major = rng.random() < 0.2
    module = RoutedAttend(
        program(mask, safe), heads=heads, kv_heads=kv, head_dim=d, value_dim=dv, time_major=major
    )
    q = torch.randn(batch, 1, heads, d).transpose(1, 2)
    k, v = torch.randn(batch, kv, keys, d), torch.randn(batch, kv, keys, dv)
    if rng.random() < 0.3:  # a cache with room, and the layout of models that keep (B, S, G, d)
        k = torch.randn(batch, kv, keys + 9, d)[:, :, :keys]
        v = torch.randn(batch, keys, kv, dv).transpose(1, 2)
    live = torch.rand(batch, 1, heads) < rng.choice([0.0, 0.4, 0.7, 1.0])
    select = live.float().transpose(0, 1) if major else live.float()
    rest = []
    if mask != "none":
        shape = rng.choice([(batch, 1, 1, keys), (1, heads, 1, keys), (keys,), (1, 1, 1, keys)])
        seen = torch.rand(shape) < 0.8
        if not safe:
            seen[..., 0] = True
        added = torch.randn(shape).masked_fill(~seen, rng.choice([float("-inf"), -3.4e38]))
        rest = [seen if mask == "bool" else added]
    torch.set_num_threads(rng.choice([1, 2]))
    mine, eager = both(module, q, k, v, select, *rest)
    # probabilities: errors of scores (d products) and of exp (2 ulp); then a mean of values
    size = q.abs().amax() * k.abs().amax() * d * 0.3 + 20
    eps = torch.finfo(torch.float32).eps
    bound = float((2 * (d + 4) * size + 2 * (keys + 8)) * eps * v.abs().amax())
    torch.testing.assert_close(mine, eager, rtol=0, atol=bound)
    assert torch.equal(mine[~live.transpose(1, 2)], torch.zeros_like(mine[~live.transpose(1, 2)]))


def test_random_shapes() -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        check(random.Random(seed))


@pytest.mark.slow
def test_500_random_shapes() -> None:
    for seed in range(1000, 1500):
        torch.manual_seed(seed)
        check(random.Random(seed))


def made(heads: int = 6, kv: int = 3, mask: str = "none", safe: bool = True) -> RoutedAttend:
    return RoutedAttend(program(mask, safe), heads=heads, kv_heads=kv, head_dim=16, value_dim=16)


def test_dead_heads_are_not_read() -> None:
    q, k, v = torch.randn(1, 6, 1, 16), torch.randn(1, 3, 50, 16), torch.randn(1, 3, 50, 16)
    select = torch.tensor([[[1.0, 0, 0, 0, 1, 1]]])
    module = made()
    mine, _ = both(module, q, k, v, select)
    q[0, [1, 2, 3]] = k[0, 1] = v[0, 1] = float("nan")
    module.kernel = AttendKernel(module)
    assert torch.equal(module(q, k, v, select), mine)


def test_nothing_to_attend_to() -> None:
    q, k, v = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 16)
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    mask[1] = False
    for safe in (True, False):
        mine, eager = both(made(mask="bool", safe=safe), q, k, v, torch.ones(2, 1, 6), mask)
        torch.testing.assert_close(mine, eager, equal_nan=True)
        assert mine[1].isnan().all() != safe
    k[0, 0, 3] = float("nan")
    mine, eager = both(made(), q, k, v, torch.ones(2, 1, 6))
    torch.testing.assert_close(mine, eager, equal_nan=True)
    assert mine[0, :2].isnan().all() and not mine[0, 2:].isnan().any()


def test_bfloat16() -> None:
    q, k, v = (torch.randn(1, h, s, 16).bfloat16() for h, s in ((6, 1), (3, 50), (3, 50)))
    select = torch.tensor([[[1.0, 0, 0, 0, 1, 1]]]).bfloat16()
    mine, eager = both(made(), q, k, v, select)
    torch.testing.assert_close(mine, eager, rtol=2**-7, atol=1e-5)


def test_what_is_refused_and_declined() -> None:
    module = made()
    kernel = AttendKernel(module)
    k = torch.randn(1, 3, 5, 16)
    assert kernel(module, torch.randn(1, 6, 2, 16), k, k, torch.ones(1, 2, 6)) is None
    assert kernel(module, torch.randn(1, 6, 1, 16), k, k, torch.ones(1, 1, 6).bool()) is None
    assert kernel(module, torch.randn(1, 6, 1, 16), k[..., ::2], k, torch.ones(1, 1, 6)) is None
    masked = made(mask="added")
    q, ones = torch.randn(1, 6, 1, 16), torch.ones(1, 1, 6)
    assert AttendKernel(masked)(masked, q, k, k, ones, torch.ones(5, dtype=torch.bool)) is None
    masked.causal = True
    with pytest.raises(Refused, match="causal"):
        AttendKernel(masked)


def test_lowered_by_the_plan() -> None:
    """A module without weights, which follows the device of its inputs."""
    module = made()
    assert lower_module(module).kind == "applied"
    assert isinstance(module.kernel, AttendKernel)


def test_score_programs() -> None:
    assert Score.of(program("bool", True, 0.25)) == Score(0.25, "bool", True)
    assert Score.of(program("added", False)) == Score(0.3, "added", False)
    assert Score.of(program("none", True)) == Score(0.3, "none", True)
    plain = program("added", False)
    scaled, masked, softmax = plain.steps
    capped = Step("capped", "aten.tanh.default", (Ref("scaled"),))
    elsewhere = Step("live", "aten.softmax.int", (Ref("masked"), -2))
    twice = Step("more", "aten.add.Tensor", (Ref("masked"), Ref("op0")))
    for steps in (
        (scaled, capped, Step("masked", "aten.add.Tensor", (Ref("capped"), Ref("op0"))), softmax),
        (scaled, masked, elsewhere),
        (scaled, masked, twice, Step("live", "aten.softmax.int", (Ref("more"), -1))),
        (scaled, Step("masked", "aten.mul.Tensor", (Ref("scaled"), Ref("op0"))), softmax),
        (scaled, Step("live", "aten.softmax.int", (Ref("scaled"), -1))),
    ):
        with pytest.raises(Refused, match="more than a scale"):
            Score.of(Program(plain.inputs, steps, "live"))
