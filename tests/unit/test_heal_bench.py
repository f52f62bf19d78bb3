"""benchmarks/heal.py on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")


def test_heal(bench: Callable[[str], Any], tmp_path: Path) -> None:
    out = tmp_path / "h.json"
    bench("heal").main(
        ["--quick", "--pipeline", "hidden-route{at=*.mlp.* active=0.5}", "--fitted", "mixed",
         "--train", "routed", "--half", "--steps", "4", "--every", "4", "--rate", "20",
         "--kinds", "docstrings,code", "--tokens", "1024", "--output", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert [row["text"] for row in found["measured"]] == [
        "docstrings, held out", "code, held out",
    ]  # fmt: skip
    for row in found["measured"]:
        assert row["tokens"] == 1024
        for who in ("before", "after"):
            low, high = row[who]["ratio_within"]
            assert low <= row[who]["ratio"] <= high
            assert row[who]["counted"] <= 0.5
            assert row[who]["counted"] == pytest.approx(0.5, abs=0.1)
            assert row[who]["ratio"] == pytest.approx(row[who]["perplexity"] / row["dense"])
    assert found["healing"]["train"] == "routed"
