"""Routed attention kernels against the eager module; tolerance: closeness.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.codegen.triton import attend, attend_ops
from sparsify.core import Refused
from sparsify.runtime.attend import RoutedAttend
from sparsify.runtime.program import Program, Ref, Step
from tests.kernels.triton.closeness import close


def program(scale: float, mask: str, safe: bool, *before: Step) -> Program:
    steps, at = [Step("m", "aten.mul.Tensor", (Ref("scores"), scale)), *before], "m"
    at = steps[-1].name
    if mask == "bool":
        steps.append(Step("dead", "aten.logical_not.default", (Ref("op0"),)))
        steps.append(Step("f", "aten.masked_fill.Scalar", (Ref(at), Ref("dead"), -math.inf)))
    elif mask == "added":
        steps.append(Step("f", "aten.add.Tensor", (Ref(at), Ref("op0"))))
    at = steps[-1].name
    kind = ("aten._safe_softmax.default", (Ref(at), -1)) if safe else (
        "aten.softmax.int", (Ref(at), -1, torch.float32))  # fmt: skip
    steps.append(Step("p", *kind))
    return Program(("scores",) if mask == "none" else ("scores", "op0"), tuple(steps), "p")


def both(module: RoutedAttend, *inputs: torch.Tensor) -> None:
    wanted = module(*inputs)
    counted = (module.counter.units_live, module.counter.tokens, module.counter.rows)
    module.counter.reset()
    ran: list[bool] = []
    inner = attend.lower(module)

    def kernel(m: Any, *a: torch.Tensor) -> Any:
        found = inner(m, *a)
        ran.append(found is not None)
        return found

    module.kernel = kernel
    found = module(*inputs)
    assert ran == [True]
    assert torch.equal(found.isnan(), wanted.isnan())
    close(found.nan_to_num(), wanted.nan_to_num(), inputs[1].shape[2] + inputs[0].shape[3])
    assert (module.counter.units_live, module.counter.tokens, module.counter.rows) == counted


def case(seed: int, high: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    torch.manual_seed(seed)
    batch, kv_heads, shared, width, value = draw(3), draw(3), draw(4), draw(40), draw(40)
    tokens, keys = (1 if seed % 3 == 0 else draw(high)), draw(high)
    heads = kv_heads * shared
    mask, safe = ("none", "bool", "added")[seed % 5 % 3], seed % 2 == 0
    module = RoutedAttend(
        program(width**-0.5, mask, safe), heads=heads, kv_heads=kv_heads, head_dim=width,
        value_dim=value, causal=seed % 4 == 0, time_major=seed % 7 == 0,
    )  # fmt: skip
    live = (torch.rand(batch, tokens, heads) < (0.0, 0.4, 0.8, 1.0)[seed // 5 % 4]).float()
    if module.time_major:
        live = live.transpose(0, 1)
    full = [batch, heads, tokens, keys]
    shape = [n if torch.rand(()) < 0.5 else 1 for n in full[:3]] + [keys]
    operand = torch.rand(shape) < 0.6 if mask == "bool" else torch.randn(shape)
    inputs = [torch.randn(batch, heads, tokens, width), torch.randn(batch, kv_heads, keys, width),
              torch.randn(batch, kv_heads, keys, value), live]  # fmt: skip
    with torch.no_grad():
        both(module, *inputs, *([operand] if mask != "none" else []))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_matches_eager_on_random_shapes(seed):
    case(seed, 60)


@pytest.mark.slow
def test_matches_eager_on_500_shapes():
    for seed in range(500):
        case(20_000 + seed, 200)


def plain(heads: int, kv_heads: int, width: int, **options: Any) -> RoutedAttend:
    return RoutedAttend(
        program(width**-0.5, "none", True), heads=heads, kv_heads=kv_heads, head_dim=width,
        value_dim=width, **options,
    )  # fmt: skip


def test_decoding_is_split_over_keys():
    torch.manual_seed(1)
    live = (torch.rand(2, 1, 6) < 0.5).float()
    k = torch.randn(2, 700, 2, 16)
    both(plain(6, 2, 16), torch.randn(2, 6, 1, 16), k.transpose(1, 2), k.mul(2).transpose(1, 2),
         live)  # fmt: skip


def test_non_contiguous_inputs():
    torch.manual_seed(2)
    q = torch.randn(2, 9, 4, 16).transpose(1, 2)
    k = torch.randn(2, 2, 16, 11).transpose(2, 3)
    both(plain(4, 2, 16, causal=True), q, k, k.clone(), (torch.rand(2, 4, 9) < 0.5).transpose(1, 2))


@pytest.mark.parametrize("tokens", [1, 20])
def test_half_precision(tokens):
    torch.manual_seed(3)
    q, k = torch.randn(1, 4, tokens, 16).half(), torch.randn(1, 2, 33, 16).half()
    both(plain(4, 2, 16), q, k, torch.randn(1, 2, 33, 16).half(),
         (torch.rand(1, tokens, 4) < 0.6).half())  # fmt: skip


def test_dead_heads_read_no_key():
    from sparsify.codegen.triton import traffic

    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 300, 16)
    for tokens in (1, 40):
        live = torch.zeros(1, tokens, 4)
        with traffic.count() as none:
            attend_ops.routed_attend(q[:, :, :tokens], k, k, live, None, 1.0, False, True)
        live[:, :, 0] = 1
        with traffic.count() as one:
            attend_ops.routed_attend(q[:, :, :tokens], k, k, live, None, 1.0, False, True)
        # one key/value head's keys and values (the same tensor) more than nothing
        assert one.moved - none.moved >= 300 * 16 * 4
        assert none.moved < 300 * 16 * 4
        assert one.moved - none.moved < 1.6 * 300 * 16 * 4


def test_pages_are_the_keys_they_hold():
    torch.manual_seed(4)
    page, lengths = 8, torch.tensor([37, 5, 16], dtype=torch.int32)
    pages = torch.randn(12, page, 2, 16), torch.randn(12, page, 2, 16)
    table = torch.randperm(12)[:12].int()
    table = torch.stack([table[:5], table[5:10], table[[10, 11, 0, 1, 2]]])
    q = torch.randn(3, 6, 1, 16)
    live = (torch.rand(3, 1, 6) < 0.6).float()
    found = attend_ops.routed_attend_paged(q, *pages, table, lengths, live, 0.25)
    for row, length in enumerate(lengths.tolist()):
        k, v = (p[table[row].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for p in pages)
        wanted = plain(6, 2, 16)(q[row : row + 1], k, v, live[row : row + 1])
        close(found[row : row + 1], wanted, length + 16)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_gradients_are_those_of_eager(mask):
    torch.manual_seed(5)
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, 6), (2, 9), (2, 9)))
    live = (torch.rand(2, 6, 4) < 0.6).float()
    operand = torch.randn(2, 1, 6, 9, requires_grad=True)
    if mask == "bool":
        operand = torch.rand(2, 1, 6, 9) < 0.7
        operand[..., 0] = True
    module = RoutedAttend(
        program(0.3, mask, True), heads=4, kv_heads=2, head_dim=8, value_dim=8,
        causal=mask == "none",
    )  # fmt: skip
    more = [] if mask == "none" else [operand]
    leaves = [q, k, v, *(o for o in more if o.requires_grad)]
    g = torch.randn(2, 4, 6, 8)
    wanted = torch.autograd.grad(module(q, k, v, live, *more), leaves, g)
    ours = attend_ops.routed_attend(
        q, k, v, live, more[0] if more else None, 0.3, mask == "none", True
    )
    for a, b in zip(torch.autograd.grad(ours, leaves, g), wanted, strict=True):
        close(a, b, 40)


def test_other_score_programs_are_refused():
    capped = program(1.0, "none", True, Step("t", "aten.tanh.default", (Ref("m"),)))
    with pytest.raises(Refused, match=r"aten\.tanh"):
        attend.scores_of(capped)
    assert attend.scores_of(program(0.5, "bool", True)) == attend.Scores(0.5, "bool", True)
    assert attend.scores_of(program(0.5, "added", False)) == attend.Scores(0.5, "added", False)


def test_ops_are_what_their_fakes_say():
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8)
    live = (torch.rand(1, 5, 4) < 0.5).float()
    torch.library.opcheck(attend_ops.routed_attend, (q, k, k.clone(), live, None, 0.3, False, True))
