"""benchmarks/kernels.py: every backend computes one function, and the ideal is what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")


@pytest.fixture
def kernels(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; other tests of this process open ONNX Runtime sessions too."""
    monkeypatch.setattr(bench("ffn_backends"), "ONE_POOL", False)
    return bench("kernels")


def test_all_backends_on_a_small_layer(
    kernels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs through; a backend with another result would have stopped it."""
    out = tmp_path / "k.json"
    words = "--quick --widths 32/48 --experts 6 --tokens 1,5 --active 0.5 --threads 1"
    points = kernels.main([*words.split(), "--output", str(out)])
    assert [(p.tokens, p.experts, p.active) for p in points] == [(1, 6, 0.5), (5, 6, 0.5)]
    for p in points:
        assert set(kernels.PEERS) <= set(p.times)
        assert set(kernels.DENSE) - set(p.times) == {"compiled"}
        assert set(p.errors) == set(p.times) - set(kernels.PRUNED)
        assert max(p.errors.values()) < 1e-5
        assert p.union >= 0.5
        assert p.times[p.dense].median == min(
            p.times[name].median for name in kernels.DENSE if name in p.times
        )
    assert points[0].union == 0.5  # one token uses three of six
    content = json.loads(out.read_text())
    assert [row["tokens"] for row in content["points"]] == [1, 5]
    assert content["threads"] == 1
    assert content["machine"]["packages"]["torch"]
    shown = capsys.readouterr().out
    assert "compiled left out: --compile times it" in shown
    assert "faster than every peer at" in shown


def point(kernels: Any, tokens: int, union: float, ours: float, **times: float) -> Any:
    """A layer of 100 weights in the dense best time 1."""
    all_times = {"ours": ours, "natural": 1.0, **times}
    spreads = {name: kernels.Spread(t, t, t) for name, t in all_times.items()}
    speedup = kernels.Spread(1 / ours, 1 / ours, 1 / ours)
    return kernels.Point(
        10, 10, 4, 0.25, tokens, union, spreads, speedup, "natural", {"ours": 0.0}, "", {}
    )


def test_the_ideal_follows_what_binds_the_dense_layer(kernels: Any) -> None:
    """300 weights: 1200 bytes, 600 operations a token; both rates such that 8 tokens are even."""
    bandwidth, rate = 1200.0, 600.0 * 8
    few = point(kernels, 4, 0.75, 0.8)
    few.judge(bandwidth, rate)
    assert few.bound == "memory"
    assert few.of_ideal.median == pytest.approx(0.75 / 0.8)  # three experts of four are read
    assert few.of_strict == pytest.approx(0.25 / 0.8)
    assert few.of_roof == pytest.approx(0.75 / 0.8)
    many = point(kernels, 64, 1.0, 0.5)
    many.judge(bandwidth, rate)
    assert many.bound == "arithmetic"
    assert many.of_ideal.median == pytest.approx(0.25 / 0.5)
    assert many.of_roof == pytest.approx(0.25 * 8 / 0.5)  # dense at its best would take 8


def test_who_is_faster_is_named(kernels: Any) -> None:
    found = point(kernels, 1, 0.25, 0.5, **{"hf grouped": 0.6, "eager": 0.5, "pruned": 0.4})
    found.judge(1200.0, 4800.0)
    assert not found.wins
    assert found.lost_to == ("eager", "pruned")  # a tie is no win
    assert "loses to eager, pruned" in kernels.table([found])
    found.times.pop("pruned")
    found.times["eager"] = kernels.Spread(0.7, 0.7, 0.7)
    found.judge(1200.0, 4800.0)
    assert found.wins
    assert found.to_dict()["target"] == 0.9
    assert found.to_dict()["met"] is False  # 0.25 / 0.5 of the ideal


def test_another_function_is_refused(kernels: Any) -> None:
    import torch

    x = torch.ones(2, 3)
    right = {name: [lambda: x] for name in ("natural", "eager", "ours")}
    assert set(kernels._errors(right)) == set(right)
    with pytest.raises(SystemExit, match="MKL computes another function"):
        kernels._errors({**right, "MKL": [lambda: x * 1.001]})
    with pytest.raises(SystemExit, match="ours computes another function"):
        kernels._errors({**right, "ours": [lambda: x * float("nan")]})


# ---------------------------------------------------------------------------- the GPU's script


def test_gpu_script_refuses_without_a_gpu(
    bench: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = bench("gpu")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == (
        "error: this benchmark needs a CUDA device, and torch sees none\n"
    )


def test_gpu_script_measures(bench: Callable[[str], Any], kernels: Any) -> None:
    """Its way through, on CPU: all backends agree, every token count has its point."""
    gpu = bench("gpu")
    found = list(gpu.measure(
        32, 64, "cpu", "float32", 1, 1 << 14, experts=(4,), budgets=(0.5,), tokens=(1, 5),
    ))  # fmt: skip
    assert [p.tokens for p in found] == [1, 5]
    for p in found:
        assert {"ours", "grouped mm", "hf grouped", "natural", "by neuron"} <= set(p.times)
        assert max(p.errors.values()) < 1e-5
    assert "reads" in kernels.judged(found)
    assert len(kernels.table(found).splitlines()) >= 3
