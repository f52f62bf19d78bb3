"""A new idea is one file: the pass that the README shows, installed by another package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import registry, text
from sparsify.cli import main
from sparsify.errors import BadOption
from sparsify.evidence import dense_limit, error_between
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import captured

SOURCE = Path(__file__).parent / "data" / "ffn_halves.py"
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``acme-passes``, a distribution with the file and an entry point for it."""
    folder = tmp_path / "site"
    info = folder / "acme_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "ffn_halves.py").write_text(SOURCE.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparsify.passes]\nffn-halves = ffn_halves\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("ffn_halves", None)


def compiled(name: str = "llama", pipeline: str = "ffn-halves", **options: Any) -> Any:
    dtype = options.pop("dtype", torch.float32)
    return sparsify.compile(captured(name, dtype), pipeline, reproducer=None, **options)


def test_the_file_is_short() -> None:
    lines = [line for line in SOURCE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 30


def test_it_is_found_by_name() -> None:
    assert "ffn-halves" in registry.names() and "ffn-moe" in registry.names()
    assert registry.owner("ffn-halves") == "acme-passes"
    assert registry.get("ffn-halves").name == "ffn-halves"
    assert registry.problems() == ()


@pytest.mark.parametrize(
    "pipeline",
    [
        "ffn-halves",
        "ffn-halves{active=0.5}",
        "attn-moh,ffn-halves{active=0.5 at=model.layers.0.*}",
    ],
)
def test_pipeline_text_comes_back(pipeline: str) -> None:
    stages = text.parse(pipeline)
    assert text.unparse(stages) == pipeline
    assert registry.build(stages[-1]).changed_options() == stages[-1].options


def test_options_are_checked() -> None:
    with pytest.raises(BadOption, match=r"cannot be 1\.5"):
        registry.build(text.parse("ffn-halves{active=1.5}")[0])
    with pytest.raises(BadOption, match="did you mean 'active'"):
        registry.build(text.parse("ffn-halves{actve=0.5}")[0])


def test_the_command_line_explains_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["passes", "ffn-halves"]) == 0
    assert capsys.readouterr().out == (
        "ffn-halves: split each feed-forward layer into two experts, its first and second half.\n"
        "\n"
        "works on FeedForward; claims REORDERED; from acme-passes\n"
        "\n"
        "option  type   default  meaning\n"
        "active  float  1.0      fraction of experts that a token uses (> 0 and <= 1)\n"
        "at      paths  *        regions to work on, as in model.layers.[4-27].mlp\n"
        "skip    paths           regions to leave alone\n"
    )
    assert main(["passes"]) == 0
    (row,) = (r for r in capsys.readouterr().out.splitlines() if r.startswith("ffn-halves"))
    assert "FeedForward" in row and "split each feed-forward layer into two experts" in row


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt"])
@torch.no_grad()
def test_the_contract(name: str, dtype: torch.dtype) -> None:
    model = compiled(name, dtype=dtype)
    (step,) = model.report.steps
    assert step.count("applied") == 2 and model.report.ok
    with dense_limit(model):
        outputs = model.graph(*model.example)
    for found, expected in zip(outputs, model.golden, strict=True):
        error, scale = error_between(found, expected)
        assert error <= LIMITS[dtype] * scale
    dense = dict(captured(name, dtype).graph.named_parameters())
    undone = dense_weights(model, step.weights)
    assert undone and all(torch.equal(tensor, dense[path]) for path, tensor in undone.items())


def test_it_runs_with_ours_and_skips_work() -> None:
    model = compiled(pipeline="ffn-halves{active=0.5},attn-moh")
    with torch.no_grad():
        model.graph(*model.example)
    live = [v for path, v in model.realised().items() if path.endswith("mlp.halves")]
    assert live == [0.5, 0.5]
    step = model.report.steps[0]
    assert step.after.by_kind["RoutedFFN"] < 0.55 * 2 * 3 * 2 * 32 * 96  # half of both layers


def test_the_report_has_its_row() -> None:
    report = compiled().report
    shown = report.golden()
    assert "1. ffn-halves   claims REORDERED" in shown
    assert "model.layers.[0-1].mlp   2 regions   FeedForward" in shown
    assert "two halves" in shown
    assert report.to_dict()["steps"][0]["pass_name"] == "ffn-halves"


def test_it_refuses_with_a_remark() -> None:
    from torch import nn

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 15), nn.Linear(15, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    report = sparsify.compile(Odd(), "ffn-halves", torch.randn(2, 4, 8)).report
    (remark,) = report.steps[0].remarks
    assert remark.kind == "left"
    assert remark.reason == "15 hidden neurons do not divide into two halves"


def test_a_saved_model_needs_the_package_no_more(tmp_path: Path) -> None:
    model = compiled()
    model.save(tmp_path / "out")
    for path in [p for p in sys.path if p.startswith(str(tmp_path))]:
        sys.path.remove(path)
    sys.modules.pop("ffn_halves", None)
    assert "ffn-halves" not in registry.names()
    assert sparsify.load(tmp_path / "out").pipeline == "ffn-halves"
    assert sparsify.verify(tmp_path / "out").ok


def test_inspect_lists_it() -> None:
    found = sparsify.inspect(captured("llama"))
    rows = [row for row in found.regions if row.kind == "FeedForward"]
    assert rows and all("ffn-halves" in row.applies for row in rows)
