"""The report: JSON round trip and schema, stable text, narrow terminals, groups, diff."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.core import Moved, Remark
from sparsify.errors import BadInput
from sparsify.report import (
    ChoiceRow,
    Choices,
    EmbeddingRow,
    Embeddings,
    Evidence,
    Interval,
    ModelFacts,
    Quality,
    QualityRow,
    Report,
    Resampled,
    Routing,
    RoutingRow,
    Step,
    number,
)
from sparsify.report_diff import diff
from sparsify.report_groups import collapse, group_remarks, ranges
from sparsify.report_json import SCHEMA_FILE, schema
from sparsify.text_paths import match_path


def facts(**changes: Any) -> ModelFacts:
    base = ModelFacts(
        nodes=1240, parameters=134_515_008, parameter_bytes=538_060_032, flops_per_token=2.71e8,
        bytes_per_token=5.38e8,
        by_kind={"FeedForward": 1.59e8, "Attention": 5.5e7, "other": 5.66e7},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def ffn_step(experts: int = 8, left: int = 2) -> Step:
    paths = [f"model.layers.{i}.mlp" for i in range(30)]
    where = "modeling_llama.py:164   down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
    remarks = [
        Remark("applied", "ffn-moe", p, "FeedForward", f"{experts} experts, router error 0.{i:02d}")
        for i, p in enumerate(paths[left:])
    ]
    remarks += [
        Remark("left", "ffn-moe", p, "FeedForward", "1537 neurons do not divide into 8 experts",
               "experts=29 (1537 = 29 x 53)", where)
        for p in paths[:left]
    ]  # fmt: skip
    why = "down: no residual add after it"
    place = "mine.py:9   self.down(x)"
    remarks.append(Remark("near-miss", "ffn-moe", "head.mlp", "FeedForward", why, None, place))
    weights = [
        Moved(f"{p}.{role}_proj.weight", f"{p}.ffn.{role}", "rows in the order of `order`")
        for p in paths[left:]
        for role in ("up", "gate", "down")
    ]
    evidence = [
        Evidence("region", p, "REORDERED", "float32", 1e-7 * (i + 1), 3.0, 6.6e-5, True)
        for i, p in enumerate(paths[left:])
    ]
    evidence.append(Evidence("end-to-end", "", "REORDERED", "float32", 2e-5, 20.0, 4e-4, True))
    return Step(
        "ffn-moe", f"ffn-moe{{experts={experts} active=0.5}}", "REORDERED", tuple(remarks),
        1240, 960, 134_515_008, 134_653_248, facts(),
        facts(nodes=960, parameters=134_653_248, flops_per_token=1.93e8),
        tuple(weights), tuple(evidence), 12.5,
    )  # fmt: skip


def make(static: float = 36.1, **changes: Any) -> Report:
    step = ffn_step()
    rows = (
        QualityRow("dense", 1.0, None, 12.55, 1.0, 0.0, 1.0),
        QualityRow("routed", 0.5, 0.503, 27.04, 2.155, 0.61, 0.58),
        QualityRow("static pruning", 0.5, 0.5, static, static / 12.55, 0.9, 0.5, "energy"),
    )
    report = Report(
        "0.1.0", "smollm2", "ffn-moe{experts=8 active=0.5}", 0.5, "float32",
        {"capture": 3.25, "ffn-moe": 12.5}, {"cpu": "a processor", "torch": "2.13.0"}, facts(),
        facts(nodes=960, parameters=134_653_248, flops_per_token=1.93e8), (step,),
        end_to_end=step.evidence[-1], quality=Quality("python docstrings", 8192, rows),
        calibration="python docstrings (calibration half)",
    )  # fmt: skip
    return dataclasses.replace(report, **changes)


# ---------------------------------------------------------------------------- JSON


def test_json_round_trip_is_the_identity() -> None:
    report = make()
    assert Report.from_json(report.to_json()) == report


def test_weight_map_round_trips() -> None:
    moved = Moved("qkv.weight", "query.blocks", "rows by head", "weight", True, ((0, 4), (8, 12)))
    report = make(steps=(dataclasses.replace(ffn_step(), weights=(moved,)),))
    assert Report.from_json(report.to_json()).steps[0].weights == (moved,)


def test_infinite_tolerance_survives_strict_json() -> None:
    measured = Evidence("end-to-end", "", "APPROXIMATE", "float32", 0.5, 1.0, math.inf, True)
    text = make(end_to_end=measured).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Report.from_json(text).end_to_end
    assert back is not None
    assert back.tolerance == math.inf


def test_json_follows_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(make().to_dict(), schema())
    broken = make().to_dict() | {"steps": [{}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema())


def test_schema_file_is_up_to_date(accept: bool) -> None:
    text = json.dumps(schema(), indent=2) + "\n"
    if accept:
        SCHEMA_FILE.write_text(text, encoding="utf-8")
    assert SCHEMA_FILE.read_text(encoding="utf-8") == text, "run pytest --accept"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "not a sparsify report"),
        ({"format_version": 99}, "format version 99"),
        ({"surprise": 1}, "'surprise'"),
        ({"steps": 3}, "report.steps is 3"),
        ({"dense": {"nodes": 1}}, "report.dense has no field 'parameters'"),
    ],
)
def test_malformed_reports_name_the_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says.replace("'", ".")):
        Report.from_dict(make().to_dict() | change)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Report.from_json(text)


# ---------------------------------------------------------------------------- text


def test_golden_text(golden: Any) -> None:
    golden("report/full.txt", make().golden())


def routing() -> Routing:
    heads = RoutingRow(
        "model.layers.0.self_attn.router", "threshold", 4, 1, 0.5, 0.4, (0, 2, 3), (0.6, 0.1, 0.5),
        0.85, 1.5, 0.71, 1.2, 0.93,
    )  # fmt: skip
    experts = RoutingRow(
        "model.layers.0.mlp.moe.router", "top-k", 40, 8, 0.5, 0.375, tuple(range(8, 40)),
        (0.375,) * 32, 1.0, 1.0, math.nan, math.nan, 0.8,
    )  # fmt: skip
    return Routing("python docstrings", 4096, 0.5, 16, 2.0, (heads, experts))


def test_golden_text_with_routing(golden: Any) -> None:
    report = make(routing=routing())
    golden("report/routing.txt", routing().render(stable=True))
    assert routing().render(stable=True).strip() in report.golden()
    assert "routing on" not in make().golden()
    assert Report.from_json(report.to_json()).to_json() == report.to_json()  # NaN survives
    jsonschema.validate(report.to_dict(), schema())
    old = make().to_dict()
    del old["routing"]  # written before there was one
    assert Report.from_dict(old) == make()
    assert all(len(line) <= 60 for line in routing().render(60).splitlines())


def test_golden_text_when_static_pruning_wins(golden: Any) -> None:
    first, second = ffn_step(), dataclasses.replace(ffn_step(16, left=0), before=None)
    golden("report/static-wins.txt", make(static=25.0, steps=(first, second)).golden())


def test_stable_text_forgets_time_machine_version_and_noise() -> None:
    report = make()
    step = report.steps[0]
    noisy = tuple(dataclasses.replace(e, error=e.error * 1.7) for e in step.evidence)
    other = dataclasses.replace(
        report, version="9.9", seconds={"capture": 99.0}, machine={"cpu": "another"},
        steps=(dataclasses.replace(step, evidence=noisy, seconds=1.0),),
        end_to_end=noisy[-1],
    )  # fmt: skip
    assert other.golden() == report.golden()
    assert other.text() != report.text()


def test_full_text_has_time_machine_and_errors() -> None:
    text = make().text()
    for part in ("capture 3.2 s", "cpu a processor", "largest error 2e-05 is 5 % of the tolerance"):
        assert part in text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_line_fits_unless_a_word_does_not(width: int) -> None:
    for line in make().text(width).splitlines():
        assert len(line) <= width or len(line.split()) <= 2, line


def test_thirty_equal_remarks_are_one_line() -> None:
    text = make().text()
    assert "model.layers.[2-29].mlp   28 regions" in text
    assert "8 experts, router error 0.00..0.27" in text
    assert text.count("1537 neurons do not divide") == 1
    assert "help: experts=29" in text


def test_weight_map_is_summarised() -> None:
    text = make().text(200)
    assert "model.layers.[2-29].mlp.up_proj.weight -> model.layers.[2-29].mlp.ffn.up" in text
    assert text.count("->") == 3


def test_failed_claim_is_loud() -> None:
    bad = Evidence("end-to-end", "", "EXACT", "float32", 0.5, 1.0, 0.0, False)
    report = make(end_to_end=bad)
    assert not report.ok
    assert "1 of 30 CHECKS FAILED" in report.text()
    assert "EXACT FAILS end to end: largest error 0.5 where none is allowed" in report.golden()


def test_verdicts() -> None:
    assert not make().quality.static_wins  # type: ignore[union-attr]
    losing = make(static=25.0).quality
    assert losing is not None
    assert losing.static_wins
    assert "do not use this recipe" in losing.verdicts()[0]
    alone = dataclasses.replace(losing, rows=losing.rows[:2])
    assert "was not measured" in alone.verdicts()[0]


def test_nothing_matched_and_no_checks() -> None:
    step = dataclasses.replace(ffn_step(), remarks=(), evidence=(), weights=(), before=None)
    text = make(steps=(step,), end_to_end=None, quality=None).text()
    assert "no claim was checked" in text
    assert "no region of this kind" in text


def test_terminal_has_colour_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    def shown(**env: str) -> str:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=80, _environ={**env})
        make().print(console)
        return stream.getvalue()

    assert "\x1b[32m" in shown(TERM="xterm-256color")
    plain = shown(TERM="xterm-256color", NO_COLOR="1")
    assert "\x1b[3" not in plain
    pipe = io.StringIO()
    make().print(Console(file=pipe, width=80))
    assert "\x1b" not in pipe.getvalue()
    assert pipe.getvalue() == make().text(80) or pipe.getvalue().strip() == make().text(80).strip()


# ---------------------------------------------------------------------------- groups


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.integers(0, 5))))
def test_collapsed_paths_match_exactly_what_they_stand_for(
    parts: list[tuple[int, str, int]],
) -> None:
    paths = {f"m.{a}.{b}.{c}" for a, b, c in parts}
    patterns = collapse(sorted(paths))
    universe = [f"m.{a}.{b}.{c}" for a in range(31) for b in "abc" for c in range(6)]
    matched = {p for p in universe if any(match_path(pattern, p) for pattern in patterns)}
    assert matched == paths


def test_ranges() -> None:
    assert ranges([3, 1, 2, 7, 9, 10]) == "[1-3,7,9-10]"
    assert ranges([5]) == "5"


def test_numbers_inside_names_are_not_indices() -> None:
    assert collapse(["block1.conv2", "block3.conv2"]) == ("block1.conv2", "block3.conv2")


def test_groups_keep_different_reasons_apart() -> None:
    remarks = [Remark("left", "p", f"l.{i}", "Linear", reason)
               for i, reason in enumerate(["tied", "tied", "too small"])]  # fmt: skip
    assert [(g.paths, g.count) for g in group_remarks(remarks)] == [
        (("l.[0-1]",), 2),
        (("l.2",), 1),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.55, "12.6"), (999.96, "1,000"), (4711, "4,710"), (1.9e8, "190 M"),
     (1.2345e-7, "1.23e-07"), (math.inf, "inf"), (-2.5, "-2.5")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


# ---------------------------------------------------------------------------- diff


def test_diff_of_equal_reports_is_empty() -> None:
    found = diff(make(), make(seconds={}, machine={}))
    assert found.same
    assert "no difference" in found.text()


def test_diff_shows_options_regions_costs_quality(golden: Any) -> None:
    b = make(
        pipeline="ffn-moe{experts=16 active=0.25}", active=0.25, steps=(ffn_step(16, left=0),),
        sparse=facts(nodes=960, flops_per_token=1.5e8), quality=None,
    )  # fmt: skip
    found = Report.diff(make(), b)
    assert {row.section for row in found.changes()} == {
        "options", "regions", "cost", "evidence", "quality",
    }  # fmt: skip
    row = next(r for r in found.rows if r.what == "FLOPs per token")
    assert row.ratio == pytest.approx(1.5 / 1.93)
    json.dumps(found.to_dict(), allow_nan=False)
    golden("report/diff.txt", found.text())


def test_a_report_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, sparsify.report, sparsify.report_text; assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_questions_and_embeddings_are_in_the_report(golden: Any) -> None:
    within, drawn = Interval(0.25, 0.35), Resampled("questions", 500, 1000, 0)
    choices = Choices(
        "arc.jsonl", 500, 0.25,
        (ChoiceRow("dense", 1.0, None, 0.42, 0.0, 1.0, accuracy_within=within),
         ChoiceRow("routed", 0.5, 0.503, 0.3, -0.12, 0.62, "", 0.517, within, within, within),
         ChoiceRow("static pruning", 0.5, 0.5, 0.28, -0.14, 0.5, "refitted", 0.5)),
        drawn,
    )  # fmt: skip
    sentences = Embeddings(
        "docstrings", 800, 20_000, 10, "mean",
        (EmbeddingRow("dense", 1.0, None, 1.0, 1.0, 1.0),
         EmbeddingRow("routed", 0.5, 0.5, 0.981, 0.91, 0.75, "", 0.51, within, within),
         EmbeddingRow("TEAL", 0.5, 0.51, 0.971, 0.9, 0.7, "51.0% of the inputs", 0.51)),
        drawn,
    )  # fmt: skip
    report = make(choices=choices, embeddings=sentences)
    assert Report.from_json(report.to_json()) == report
    jsonschema.validate(report.to_dict(), schema())
    assert max(map(len, report.text(100).splitlines())) <= 100
    golden("report/measures.txt", choices.render(100) + sentences.render(100))
    rows = {row.what: row.a for row in diff(report, make(), ("a", "b")).rows}
    assert rows["routed 50% on arc.jsonl: accuracy"] == 0.3
    assert rows["TEAL 50% on docstrings: cosine"] == 0.971
