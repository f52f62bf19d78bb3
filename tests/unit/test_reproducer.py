"""A pass that breaks its claim stops the compile, leaves a reproducer, and is named by bisect."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import registry
from sparsify.cli import main
from sparsify.core import APPROXIMATE, BOUNDED, EXACT, REORDERED, Claim, Pass, Rewrite, option
from sparsify.errors import BadCheckpoint, ClaimFailed
from sparsify.passes.attn_moh import AttnMoh
from sparsify.passes.ffn_moe import FfnMoe
from sparsify.regions import FeedForward
from sparsify.text import StageText
from tests.contract.zoo_captures import captured

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"


@dataclasses.dataclass(frozen=True)
class Broken(FfnMoe):
    """broken: ffn-moe, but one layer's down projection is scaled."""

    name = "broken"
    layer: int = option(1, "the layer to break")
    by: float = option(1.01, "the factor")
    nan: bool = option(False, "not a number instead")

    def rewrite(self, ffn: FeedForward) -> Rewrite:
        made = super().rewrite(ffn)
        if ffn.index == self.layer:
            made.splices[0].module.down.mul_(math.nan if self.nan else self.by)
        return made


@dataclasses.dataclass(frozen=True)
class BrokenHeads(AttnMoh):
    """broken-heads: attn-moh, but one layer's output columns are scaled."""

    name = "broken-heads"

    def rewrite(self, attention: Any) -> Rewrite:
        made = super().rewrite(attention)
        if attention.index == 1:
            made.splices[-1].module.blocks.mul_(1.01)
        return made


def claiming(claim: Claim, base: type[Any] = Broken) -> type[Any]:
    """``base`` with another claim."""
    made: type[Any] = dataclasses.dataclass(frozen=True)(
        type("Claiming", (base,), {"name": "broken", "claim": claim, "__doc__": base.__doc__})
    )
    return made


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make passes known by their names."""
    real = registry.build

    def put(*passes: type[Pass[Any]]) -> None:
        known = {p.name: p for p in passes}

        def build(stage: StageText) -> Pass[Any]:
            found = known.get(stage.name)
            return found.build(stage.options) if found else real(stage)

        monkeypatch.setattr(registry, "build", build)

    return put


def compiled(pipeline: str, folder: Path | None = None, **options: Any) -> Any:
    where = None if folder is None else str(folder)
    return sparsify.compile(captured("llama"), pipeline, reproducer=where, **options)


def failure(pipeline: str, folder: Path | None = None, **options: Any) -> ClaimFailed:
    with pytest.raises(ClaimFailed) as caught:
        compiled(pipeline, folder, **options)
    return caught.value


# ---------------------------------------------------------------------------- the failure


def test_a_broken_pass_stops_the_compile(install: Install, tmp_path: Path) -> None:
    install(Broken)
    error = failure("broken", tmp_path)
    assert error.exit_code == 1
    assert error.what == f"broken does not keep its claim at {SECOND}"
    assert error.why is not None and "claim REORDERED at the dense limit" in error.why
    assert error.where is not None and "modeling_llama.py" in error.where
    assert error.help == f"sparsify reproduce {error.reproducer}"
    assert {(e.scope, e.region) for e in error.evidence} == {
        ("region", SECOND),
        ("end-to-end", ""),
    }
    assert "[claim failed]" in error.render()


def test_other_regions_and_passes_are_not_blamed(install: Install, tmp_path: Path) -> None:
    install(Broken)
    error = failure("broken{layer=0}", tmp_path)
    assert FIRST in error.what
    assert [e.region for e in error.evidence if e.scope == "region"] == [FIRST]
    after = failure("attn-moh,broken{layer=0}", tmp_path)
    assert after.what == f"broken does not keep its claim at {FIRST}"


def test_a_small_error_is_seen_and_rounding_is_not(install: Install) -> None:
    install(Broken)
    failure("broken{by=1.0001}")
    assert compiled("broken{by=1.0}").report.ok


@pytest.mark.parametrize("active", [0.5, 1.0])
def test_the_check_is_at_the_dense_limit_whatever_the_budget(
    install: Install, active: float
) -> None:
    install(Broken)
    assert SECOND in failure("broken{shared=1}", active=active).what
    assert compiled("ffn-moe{shared=1}", active=active).report.ok


# ---------------------------------------------------------------------------- when it is checked


def test_verify_off_checks_nothing(install: Install) -> None:
    install(Broken)
    report = compiled("broken", verify="off").report
    assert report.end_to_end is None and not any(step.evidence for step in report.steps)
    assert "no claim was checked" in report.text()


def test_verify_end_checks_the_whole_model_once(install: Install, tmp_path: Path) -> None:
    install(Broken)
    error = failure("broken,attn-moh", tmp_path, verify="end")
    assert [e.scope for e in error.evidence] == ["end-to-end"]
    assert error.what == "broken,attn-moh does not keep its claim at the model's outputs"
    assert error.reproducer is None and error.help is not None and "bisect" in error.help
    assert "-p 'broken,attn-moh'" in error.help
    good = compiled("ffn-moe,attn-moh", verify="end").report
    assert good.ok and good.end_to_end is not None
    assert not any(step.evidence for step in good.steps)


# ---------------------------------------------------------------------------- kinds of claim


def test_an_exact_claim_allows_nothing(install: Install) -> None:
    install(claiming(EXACT))
    error = failure("broken{by=1.0}")  # reordered sums, as ffn-moe's
    assert {e.claim for e in error.evidence} == {"EXACT"}
    assert {e.tolerance for e in error.evidence} == {0.0}


def test_a_bounded_claim_allows_its_bound(install: Install) -> None:
    install(claiming(BOUNDED(0.02)))
    report = compiled("broken").report
    region = [e for e in report.steps[0].evidence if e.scope == "region"]
    assert report.ok and {e.claim for e in region} == {"BOUNDED(0.02)"}
    assert all(e.tolerance == pytest.approx(0.02 * e.scale) for e in region)
    error = failure("broken{by=1.1}")
    assert "claim BOUNDED(0.02)" in str(error.why)


def test_an_approximate_claim_is_measured_only(install: Install) -> None:
    install(claiming(APPROXIMATE))
    (step,) = compiled("broken{by=1.5}").report.steps
    assert step.claim == "APPROXIMATE" and all(e.ok for e in step.evidence)
    assert max(e.error for e in step.evidence) > 0.01


@pytest.mark.parametrize("claim", [EXACT, REORDERED, BOUNDED(1e-3)], ids=str)
def test_nan_fails_every_claim(install: Install, claim: Claim) -> None:
    install(claiming(claim))
    error = failure("broken{nan=true}")
    assert max(e.error for e in error.evidence) == float("inf")


# ---------------------------------------------------------------------------- the reproducer


def test_the_reproducer_fails_again(install: Install, tmp_path: Path) -> None:
    install(Broken)
    error = failure("broken", tmp_path)
    folder = Path(str(error.reproducer))
    assert folder.parent == tmp_path and folder.is_dir()
    data = json.loads((folder / "reproducer.json").read_text())
    assert (data["pipeline"], data["region"]) == ("broken", SECOND)
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert size < 200_000, "one region, not the model"
    again = sparsify.reproduce(folder)
    assert not again.ok and again.region == SECOND
    assert again.now.error == pytest.approx(again.then.error, rel=1e-3)
    assert "the claim still fails" in again.text()


def test_the_reproducer_needs_no_pass(install: Install, tmp_path: Path) -> None:
    install(Broken)
    folder = failure("broken", tmp_path).reproducer
    install()  # the pass is not known any more
    assert not sparsify.reproduce(str(folder)).ok
    assert main(["reproduce", str(folder)]) == 1


def test_a_reproducer_of_attention(install: Install, tmp_path: Path) -> None:
    install(BrokenHeads)
    error = failure("ffn-moe,broken-heads", tmp_path)
    assert "broken-heads" in error.what and "model.layers.1.self_attn" in error.what
    again = sparsify.reproduce(str(error.reproducer))
    assert not again.ok and again.now.error == pytest.approx(again.then.error, rel=1e-3)


def test_no_folder_is_written_where_none_is_wanted(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    install(Broken)
    error = failure("broken")
    assert error.reproducer is None and not list(tmp_path.iterdir())


def test_a_good_compile_leaves_no_folder(tmp_path: Path) -> None:
    compiled("ffn-moe", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_reproducer(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="is no reproducer"):
        sparsify.reproduce(tmp_path)
    (tmp_path / "reproducer.json").write_text('{"pipeline": "x"}')
    with pytest.raises(BadCheckpoint, match="is no reproducer"):
        sparsify.reproduce(tmp_path)


# ---------------------------------------------------------------------------- bisect


@pytest.mark.parametrize("pipeline", ["broken", "attn-moh,broken", "broken,attn-moh"])
def test_bisect_names_pass_and_region(install: Install, pipeline: str) -> None:
    install(Broken)
    found = sparsify.bisect(captured("llama"), pipeline)
    assert (found.pass_name, found.region, found.ok) == ("broken", SECOND, False)
    assert found.pipeline == pipeline
    assert f"broken breaks its claim at {SECOND}" in found.text()


def test_bisect_blames_the_first_of_two(install: Install) -> None:
    install(Broken, BrokenHeads)
    found = sparsify.bisect(captured("llama"), "broken-heads,broken{layer=0}")
    assert (found.pass_name, found.region) == ("broken-heads", "model.layers.1.self_attn")
    found = sparsify.bisect(captured("llama"), "broken{layer=0},broken-heads")
    assert (found.pass_name, found.region) == ("broken", FIRST)


def test_bisect_finds_nothing_in_a_good_pipeline() -> None:
    found = sparsify.bisect(captured("llama"), "ffn-moe,attn-moh")
    assert found.ok and found.region is None
    assert found.text() == "every claim of 'ffn-moe,attn-moh' holds (2 runs)"


def test_bisect_where_only_the_whole_model_fails(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions look right one by one, the model does not: halving finds the region."""
    from sparsify import pipeline as room

    install(Broken)
    monkeypatch.setattr(room, "check_regions", lambda *_: [])
    for layer, region in ((0, FIRST), (1, SECOND)):
        found = sparsify.bisect(captured("llama"), f"attn-moh,broken{{layer={layer}}}")
        assert (found.pass_name, found.region) == ("broken", region)
        assert found.evidence is not None and found.evidence.scope == "end-to-end"


def test_nothing_of_the_model_changed(install: Install) -> None:
    install(Broken)
    before = {k: v.clone() for k, v in captured("llama").graph.state_dict().items()}
    failure("broken")
    sparsify.bisect(captured("llama"), "broken")
    after = captured("llama").graph.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
