"""Settling: budgets hold in the sparse model, for all dials together and for one alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import sparsify
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.model import SparseModel
from sparsify.runtime.router import Router
from tests.contract.zoo_captures import captured, tokens_of

NAMES = ["llama", "gpt2"]


@functools.cache
def compiled(name: str) -> SparseModel:
    cap = captured(name)
    return sparsify.compile(
        cap,
        "ffn-moe{shared=1},attn-moh{shared=1}",
        calibration=tokens_of(cap, name),
        reproducer=None,
    )


def live(model: SparseModel, ids: torch.Tensor, part: type) -> float:
    """Mean live fraction of the routed modules of one kind."""
    model.reset_counters()
    with torch.no_grad():
        model(input_ids=ids)
    modules = dict(model.graph.named_modules())
    found = [v for p, v in model.realised().items() if isinstance(modules[p], part)]
    return sum(found) / len(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("active", [0.5, 0.75])
def test_budgets_hold_in_the_sparse_model(name: str, together: bool, active: float) -> None:
    model = compiled(name)
    ids = torch.cat(tokens_of(captured(name), name))
    model.set_active(active if together else 1.0)
    model.set_active(active, pass_name="ffn-moe")
    try:
        assert abs(live(model, ids, RoutedFFN) - active) <= 0.005  # the text it was settled on
    finally:
        model.set_active(1.0)


def test_dense_shifts_would_miss_the_budget() -> None:
    """Without settling, the thresholds of the dense model's scores let through something else."""
    model = compiled("gpt2")
    ids = torch.cat(tokens_of(captured("gpt2"), "gpt2"))
    routers = [m for m in model.modules() if isinstance(m, Router)]
    tables: list[Any] = [(r.settled, r.settled_alone) for r in routers]
    model.set_active(0.5)
    try:
        settled = abs(live(model, ids, RoutedFFN) - 0.5)
        for router in routers:
            router.settled = router.settled_alone = None
            router.setting = router.setting  # thresholds are read again
        assert abs(live(model, ids, RoutedFFN) - 0.5) > settled
    finally:
        for router, (one, two) in zip(routers, tables, strict=True):
            router.settled, router.settled_alone = one, two
        model.set_active(1.0)


def test_company_says_how_far_the_others_are_down() -> None:
    model = compiled("llama")
    routers = {p: m for p, m in model.graph.named_modules() if isinstance(m, Router)}
    ffn = [m for p, m in routers.items() if ".mlp" in p]
    heads = [m for p, m in routers.items() if ".mlp" not in p]
    try:
        model.set_active(0.5)
        assert {r.company for r in ffn + heads} == {1.0}
        model.set_active(1.0, pass_name="attn-moh")
        assert {r.company for r in ffn} == {0.0}
        model.set_active(0.75, pass_name="attn-moh")
        assert ffn[0].company == pytest.approx(0.5, abs=0.05)
    finally:
        model.set_active(1.0)
    assert heads[0].threshold == -float("inf")
