"""Every routing rule of ffn-moe and attn-moh: dense limit, budgets, saving, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.runtime.counters import counters
from sparsify.runtime.router import Router
from tests.contract.zoo_captures import captured, tokens_of, worst_relative

CASES = (
    "ffn-moe{router=sigmoid-top-k groups=3 shared=2 experts=8 weights=scaled}",
    "ffn-moe{router=group-top-k groups=2 shared=2 experts=8}",
    "ffn-moe{router=top-p}",
    "ffn-moe{router=relu weights=scaled}",
    "ffn-moe{router=null}",
    "ffn-moe{router=expert-choice}",
    "ffn-moe{router=dense-to-sparse weights=scaled}",
    "attn-moh{router=moh weights=scaled}",
    "attn-moh{router=sigmoid-top-k}",
    "attn-moh{router=relu}",
    "attn-moh{router=null weights=scaled}",
    "attn-moh{router=top-p weights=scaled}",
)
UNCALIBRATED = ("sigmoid-top-k", "group-top-k", "moh")


@pytest.mark.parametrize("pipeline", CASES)
def test_rule(pipeline: str, tmp_path: Path) -> None:
    cap = captured("llama")
    batches = tokens_of(cap, "llama")
    assert batches is not None
    model = sparsify.compile(cap, pipeline, calibration=batches, reproducer=None)
    assert model.report.ok
    assert worst_relative(model) <= 1e-5
    model.set_active(0.6)
    model.reset_counters()
    ids = torch.cat(batches)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        if model.pipeline.startswith("ffn"):  # by sequence: the same whatever comes after
            part = model(input_ids=ids[:, :9]).logits
            torch.testing.assert_close(whole[:, :9], part, rtol=1e-4, atol=1e-5)
    live = list(model.realised().values())
    assert abs(sum(live) / len(live) - 0.6) < 0.12
    model.save(tmp_path / "out")
    again = sparsify.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, whole)
    assert sparsify.verify(tmp_path / "out").ok
    model.graph(*model.example)[0].square().sum().backward()
    routers = [m for m in model.modules() if isinstance(m, Router)]
    assert any(router.budget for router in routers)
    for router in routers:
        if not router.budget:  # the dial left this layer its shared units only
            continue
        assert router.weight.grad is not None and float(router.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("rule", UNCALIBRATED)
def test_counting_rules_need_no_data(rule: str) -> None:
    name = "attn-moh" if rule == "moh" else "ffn-moe"
    model = sparsify.compile(captured("llama"), f"{name}{{router={rule}}}", reproducer=None)
    assert worst_relative(model) <= 1e-5
    assert {m.rule for m in model.modules() if isinstance(m, Router)} == {rule}


def test_pruning_is_counted_as_skipped_work(tmp_path: Path) -> None:
    """Fewer than k experts are multiplied for tokens that are not protected."""
    cap = captured("llama")
    batches = tokens_of(cap, "llama")
    assert batches is not None
    ids = torch.cat(batches)
    work = {}
    for options in ("", " prune=0.8", " prune=0.8 protect=0", " prune=0.8 protect=0.5"):
        pipeline = f"ffn-moe{{router=top-k experts=8 shared=2{options}}}"
        model = sparsify.compile(cap, pipeline, calibration=batches, reproducer=None)
        assert model.report.ok
        assert worst_relative(model) <= 1e-5
        model.set_active(0.75)
        model.reset_counters()
        with torch.no_grad():
            whole = model(input_ids=ids).logits
            part = model(input_ids=ids[:, :9]).logits
        torch.testing.assert_close(whole[:, :9], part, rtol=1e-4, atol=1e-5)
        for _, counter in counters(model):
            assert counter.rows == counter.units_live
        work[options] = sum(c.rows / c.rows_dense for _, c in counters(model)) / 2
        if options == " prune=0.8":
            model.save(tmp_path / "out")
            with torch.no_grad():
                again = sparsify.load(tmp_path / "out")(input_ids=ids).logits
            torch.testing.assert_close(again, whole)
    assert abs(work[""] - 0.75) < 1e-6
    assert (
        work[" prune=0.8 protect=0"] <= work[" prune=0.8"] < work[" prune=0.8 protect=0.5"] < 0.75
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("router=null", "calibration"),
        ("router=expert-choice", "calibration"),
        ("router=group-top-k groups=5 experts=8 shared=2", "do not divide"),
        ("router=sigmoid-top-k groups=2 groups_kept=3 experts=8 shared=2", "cannot be kept"),
        ("router=top-k weights=scaled", "unit weights"),
        ("router=group-top-k groups=2 experts=8 shared=2 prune=0.2", "only top-k"),
    ],
)
def test_refusals(options: str, match: str) -> None:
    model = sparsify.compile(captured("llama"), f"ffn-moe{{{options}}}", reproducer=None)
    reasons = {r.reason for r in model.report.steps[0].remarks if r.kind == "left"}
    assert len(reasons) == 1
    assert match in reasons.pop()
