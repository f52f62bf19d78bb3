"""benchmarks/decode.py on a tiny model, and its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.bench_table import BenchRow
from sparsify.timing import Spread

pytest.importorskip("transformers")


@pytest.fixture
def decode(bench: Callable[[str], Any]) -> Any:
    """The script as a module."""
    return bench("decode")


def test_pipelines_beside_the_dense_models(
    decode: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "d.json", torch.get_num_threads()
    pipelines = ["ffn-moe", "ffn-moe,hidden-route"]
    arguments = ["--quick", "--threads", str(threads), "--output", str(out)]
    decode.main([*arguments, "--pipelines", "|".join(pipelines)])
    tables = json.loads(out.read_text())["tables"]
    assert [table["pipeline"] for table in tables] == pipelines
    ideals = []
    for table in tables:
        models = [(row["model"], row["active"]) for row in table["rows"]]
        dense = [model for model, active in models if active is None]
        assert dense[:2] == [decode.DENSE, decode.GRAPH]  # and with our kernels, where those win
        assert set(dense[2:]) <= {decode.DENSE_LOWERED, *decode.PARTS}
        count = models.index(("routed, eager", 1.0))
        assert models[count + 1] == ("routed, eager", 0.5)
        base = min(table["rows"][:count], key=lambda row: row["seconds"]["median"])
        assert base["base"]  # the fastest dense model
        ideals.append(table["rows"][count + 1]["counted"])
    assert ideals[1] > ideals[0] > 1  # both save more than one
    assert "speedup over 'dense" in capsys.readouterr().out


def row(active: float, speedup: float, ideal: float, high: float = 0.0) -> BenchRow:
    one = Spread(1.0, 1.0, 1.0)
    spread = Spread(speedup, speedup, high or speedup)
    return BenchRow("decode", 1, "routed, lowered", active, active, one, spread, ideal)


def test_verdicts(decode: Any) -> None:
    good = decode.judge([row(1.0, 1.01, 1.0), row(0.5, 1.9, 2.0)])
    assert good[0].startswith("never slower than the fastest dense model: at least 1.010 times")
    assert good[1].startswith("reaches 85% of the ideal at 50%: 95.0%")
    bad = decode.judge([row(1.0, 0.97, 1.0, high=1.02), row(0.9, 0.8, 1.1), row(0.5, 1.2, 2.0)])
    assert bad[0].startswith("SLOWER than dense at 100%: 0.970")
    assert "within the noise" in bad[0]
    assert bad[1].startswith("SLOWER than dense at 90%: 0.800")
    assert "within the noise" not in bad[1]
    assert bad[2].startswith("MISSES 85% of the ideal at 50%: 60.0%")
    assert decode.judge([]) == ["not lowered: nothing to judge"]
