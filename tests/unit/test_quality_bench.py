"""The scripts of benchmarks/quality/ on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
SMALL = ["--quick", "--active", "1,0.5"]


def tables(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["tables"]
    return found


def test_text(bench: Callable[[str], Any], tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    bench("text").main(
        [*SMALL, "--tokens", "1024", "--fitted", "docstrings", "--kinds", "code,reference",
         "--pipeline", "hidden-route", "--output", str(out)]
    )  # fmt: skip
    *found, both = tables(out)
    assert [t["measured"] for t in found] == ["code", "reference"]
    rows = [(row["model"], row["active"][0]) for row in both["pooled"]]
    assert rows == [(row["model"], row["active"]) for row in found[0]["rows"]]
    tokens = [t["tokens"] for t in found]
    one, two = (t["rows"][2] for t in found)
    mean = (one["kl"] * tokens[0] + two["kl"] * tokens[1]) / sum(tokens)
    assert both["pooled"][2]["kl"] == pytest.approx(mean)
    assert both["tokens"] == sum(tokens)
    models = [row["model"] for row in found[0]["rows"]]
    assert models == ["dense", "routed", "routed", "static pruning", "TEAL"]
    routed, rival = found[0]["rows"][2], found[0]["rows"][4]
    assert rival["flops"] == pytest.approx(routed["flops"], abs=0.03)
    assert routed["active"] != 0.5  # turned until what is counted is what was asked for
    assert routed["flops"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_choices(bench: Callable[[str], Any], tmp_path: Path) -> None:
    choices = bench("choices")
    made = list(choices.questions("docstrings", 20, 0))
    assert made == list(choices.questions("docstrings", 20, 0))
    assert len(made) == 20
    for question in made:
        assert len(set(question["choices"])) == 4
        assert question["choices"][question["answer"]]
    out = tmp_path / "c.json"
    choices.main([*SMALL, "--count", "6", "--kinds", "reference", "--output", str(out)])
    (found,) = tables(out)
    assert (found["questions"], found["chance"]) == (6, 0.25)


def test_embeddings(bench: Callable[[str], Any], tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    bench("embeddings").main(
        [*SMALL, "--tokens", "600", "--pipelines", "ffn-moe", "--kinds", "docstrings", "--top",
         "2", "--output", str(out)]
    )  # fmt: skip
    (found,) = tables(out)
    assert found["rows"][1]["cosine"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_bits(bench: Callable[[str], Any], tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    bench("bits").main(
        ["--quick", "--tokens", "512", "--fitting", "512", "--bits", "8,2.5", "--output", str(out)]
    )
    (found,) = tables(out)
    rows = {(row["bits"], row["active"]): row for row in found["rows"]}
    assert len(rows) == 2 * (1 + 1 + 2)  # eight bits are the same for all, however allotted
    assert rows["16 as they are", 1.0]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < rows["8 allotted", 1.0]["kl"] < rows["2.5 allotted", 1.0]["kl"]
    assert rows["2.5 allotted", 1.0]["stored"] < rows["3 even", 1.0]["stored"]
    assert rows["8 allotted", 0.5]["kl"] > rows["8 allotted", 1.0]["kl"]


@pytest.mark.slow
def test_recipes(bench: Callable[[str], Any], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    bench("recipes").main(
        [*SMALL, "--tokens", "512", "--fitted", "reference", "--kinds", "code", "--layers", "1",
         "--pipelines", "hidden-route", "--output", str(out)]
    )  # fmt: skip
    measured, *layers = tables(out)
    assert measured["measured"] == "code"
    assert len(layers) == 7  # projections of a layer
    for table in layers:
        assert 0 < table["dead inputs at the mean of dead ones"] < 1


@pytest.mark.slow
def test_pruning(bench: Callable[[str], Any], tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    bench("pruning").main(
        ["--quick", "--active", "0.75", "--tokens", "256", "--fitting", "256",
         "--output", str(out)]
    )  # fmt: skip
    (found,) = tables(out)
    share = {row["rule"]: row["share"] for row in found["rows"]}
    assert share["top-k"] == pytest.approx(0.75, abs=0.02)
    assert share["top-k, mu=0.5"] < share["top-k, mu=0.25"] < share["top-k"]
    assert share["top-k, mu=0.5, none protected"] < share["top-k, mu=0.25"]
    assert all(row["kl"] > 0 for row in found["rows"])
