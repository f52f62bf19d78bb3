"""``benchmarks/search.py`` on a tiny model: one search, measured on held-out text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.models import load_model

pytest.importorskip("transformers")


def test_every_setting_is_measured_on_held_out_text(
    tmp_path: Path, bench: Callable[[str], Any]
) -> None:
    out = tmp_path / "search.json"
    bench("search").main(
        ["--target", "flops=0.9", "--calibration", "docstrings", "--tokens", "1024",
         "--searched", "256", "--points", "0", "--output", str(out)],
        load_model("zoo:llama", tokenizer=bench("common").Letters()),
    )  # fmt: skip
    found = json.loads(out.read_text())
    tried = [candidate["name"] for candidate in found["search"]["tried"]]
    for text in ("docstrings", "licences"):
        rows = {r["setting"]: r for r in found["rows"] if r["text"] == text}
        assert list(rows) == ["dense", *tried]
        assert rows["dense"]["ratio"] == 1 and rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows["dense"]["flops"] >= 1  # routers are not needed, what stands in may be
        for name in tried:
            assert rows[name]["kl"] > 0
            assert rows[name]["flops"] == pytest.approx(0.9, abs=0.03)
            assert rows[name]["tokens"] == 4 * 255
        assert rows["even"]["gap_closed"] is None
        gap = rows["even"]["perplexity"] - rows["dense"]["perplexity"]
        best = rows["even"]["perplexity"] - rows[tried[-1]]["perplexity"]
        assert rows[tried[-1]]["gap_closed"] == pytest.approx(best / gap)
    assert set(found["minutes"]) == {"wall", "cpu_over_2_cores"}
