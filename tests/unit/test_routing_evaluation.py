"""``evaluate`` measures what the routers do, and puts it into the model's report."""

from __future__ import annotations

import json

import sparsify
from sparsify import api
from sparsify.cli import show
from sparsify.report import Report
from tests.contract.zoo_captures import captured


class Letters:
    """A tokenizer of letters, for the small vocabulary of the zoo."""

    eos_token_id = 1

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def test_evaluation_has_routing_at_the_lowest_budget() -> None:
    model = sparsify.compile(captured("llama"), "ffn-moe,attn-moh", reproducer=None)
    model.tokenizer = Letters()
    found = api.evaluate(
        model, ["What routers do on a text is measured. " * 20], active=(1.0, 0.5),
        calibration=None, tokens=600,
    )  # fmt: skip
    routing = found.routing
    assert routing is not None and routing.active == 0.5
    assert len(routing.rows) == 4  # two layers, heads and experts
    for row in routing.rows:
        assert 0 < row.live_ratio < 1 and 0 < row.srp <= 1 and 0 <= row.sch <= 1
        assert len(row.live) == row.units - row.shared == len(row.numbers)
    assert "routing on" in found.text()
    assert json.loads(show.as_json(found.to_dict()))["routing"]["segment"] == 16
    report = model.report
    assert isinstance(report, Report)
    assert report.routing == routing and report.quality == found.quality
    assert "routing on" in report.golden()
    assert api.evaluate(
        model, ["Everything is live. " * 20], active=(1.0,), calibration=None, tokens=300
    ).routing is None  # fmt: skip
