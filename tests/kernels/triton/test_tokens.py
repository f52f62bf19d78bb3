"""Token gather and scatter: copies, so every comparison is bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.codegen.triton.tokens import gather_tokens, scatter_tokens


def check(x: torch.Tensor, live: torch.Tensor, dropped: torch.Tensor | None) -> None:
    packed, index, count = gather_tokens(x, live)
    n = int(count)
    at = live.nonzero().flatten()
    assert n == len(at) and torch.equal(index[:n].long(), at)
    assert torch.equal(packed[:n], x[at]) and not packed[n:].any()
    assert not index[n:].any()
    ran = packed * 2
    wanted = x if dropped is None else x + dropped * (~live)[:, None]
    wanted = wanted.index_put((at,), ran[:n])
    assert torch.equal(scatter_tokens(ran, live, x, dropped), wanted)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 150), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_matches_eager_on_random_shapes(tokens, width, share, stand_in, seed):
    torch.manual_seed(seed)
    live = torch.rand(tokens) < share
    check(torch.randn(tokens, width), live, torch.randn(width) if stand_in else None)


@pytest.mark.slow
def test_matches_eager_on_500_shapes():
    for case in range(500):
        torch.manual_seed(case)
        tokens, width = int(torch.randint(1, 400, ())), int(torch.randint(1, 300, ()))
        check(torch.randn(tokens, width), torch.rand(tokens) < torch.rand(()), torch.randn(width))


def test_more_tokens_than_a_block_counts():
    torch.manual_seed(0)
    check(torch.randn(1100, 3), torch.rand(1100) < 0.4, None)


def test_non_contiguous_inputs_and_half_types():
    torch.manual_seed(1)
    live = torch.rand(80)[::2] < 0.5
    check(torch.randn(64, 40).t(), live, None)
    check(torch.randn(80, 100)[::2, 3:77], (torch.rand(80) < 0.5)[::2], None)
    check(torch.randn(40, 33).bfloat16(), live, None)


def test_gradients_are_those_of_eager():
    torch.manual_seed(2)
    x = torch.randn(37, 20, requires_grad=True)
    dropped = torch.randn(20, requires_grad=True)
    live = torch.rand(37) < 0.5
    g = torch.randn(37, 20)
    at = live.nonzero().flatten()
    plain = (x + dropped * (~live)[:, None]).index_put((at,), x[at].sin())
    packed = gather_tokens(x, live)[0]
    ours = scatter_tokens(packed.sin(), live, x, dropped)
    for a, b in zip(
        torch.autograd.grad(ours, (x, dropped), g),
        torch.autograd.grad(plain, (x, dropped), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_ops_are_what_their_fakes_say():
    x, live = torch.randn(10, 8), torch.rand(10) < 0.5
    torch.library.opcheck(gather_tokens, (x, live))
    torch.library.opcheck(scatter_tokens, (x, live, x.clone(), None))
