"""Healing on a tiny llama: it learns, resumes to the same weights, and never harms silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import healing_loss, zoo
from sparsify.capture import capture
from sparsify.errors import BadCheckpoint, BadInput, OutputError
from sparsify.healing import heal

IDS = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"steps": 8, "every": 4, "length": 16, "batch": 4}
_CAPTURED: list[Any] = []


def model() -> Any:
    if not _CAPTURED:
        _CAPTURED.append(capture(zoo.build("llama").model))
    made = sparsify.compile(
        _CAPTURED[0], "ffn-moe{experts=8}", calibration=[IDS[:8]], active=0.5, share=False
    )
    with torch.no_grad():  # stand-ins that are plainly wrong, so that there is much to learn
        for name, parameter in made.named_parameters():
            if name.endswith("dropped"):
                parameter.add_(0.3)
    return made


def state(made: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("train", ["routers", "lora", "all"])
def test_healing_brings_the_model_nearer_to_the_dense(train: Any) -> None:
    made = model()
    before = state(made)
    found = heal(made, [IDS], train=train, rate=20.0, **OPTIONS)
    assert found.improved
    assert found.final["kl"] < found.start["kl"]
    made.reset_counters()
    made(input_ids=IDS[:22], use_cache=False)  # the text that thresholds were fitted on
    live = made.realised().values()
    assert sum(live) / len(live) == pytest.approx(0.5, abs=0.01)
    assert state(made).keys() == before.keys()
    changed = {n for n, t in state(made).items() if not torch.equal(t, before[n])}
    assert any(n.endswith("moe.up") for n in changed) == (train != "routers")
    assert any("q_proj" in n for n in changed) == (train == "all")
    assert sparsify.verify(made).ok
    assert made.report.notes[-1].startswith(f"healed ({train}")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("train", ["routers", "lora"])
def test_killed_and_resumed_is_the_straight_run(train: Any, tmp_path: Path) -> None:
    straight = model()
    one = heal(straight, [IDS], train=train, **OPTIONS)
    broken = model()
    before = state(broken)

    def kill(event: str, done: int, total: int) -> None:
        if event == "heal" and done == 6:  # two steps after the checkpoint of step 4
            raise Killed

    folder = tmp_path / "ckpt"
    with pytest.raises(Killed):
        heal(broken, [IDS], train=train, checkpoint=folder, progress=kill, **OPTIONS)
    assert all(torch.equal(t, before[n]) for n, t in state(broken).items())
    assert [p.name for p in folder.iterdir()] == ["step-00004"]
    (folder / ".step-00008.abc.tmp").mkdir()  # as a SIGKILL while writing leaves it
    with pytest.raises(OutputError, match="unfinished"):
        heal(broken, [IDS], train=train, checkpoint=folder, **OPTIONS)
    with pytest.raises(BadCheckpoint, match=r"rate=1.0 \(now 2.0\)"):
        heal(broken, [IDS], train=train, checkpoint=folder, resume=True, rate=2.0, **OPTIONS)
    two = heal(broken, [IDS], train=train, checkpoint=folder, resume=True, **OPTIONS)
    assert not folder.exists()
    mine, theirs = state(straight), state(broken)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert one.final == two.final
    assert [r["loss"] for r in one.steps] == [r["loss"] for r in two.steps]


def test_a_model_that_does_not_get_better_is_left_as_it_was() -> None:
    made = model()
    before = state(made)
    found = heal(made, [IDS], train="lora", rate=3000.0, **OPTIONS)
    assert not found.improved
    assert "did not improve" in found.summary()
    assert all(torch.equal(t, before[n]) for n, t in state(made).items())


def test_bad_calls() -> None:
    made = model()
    with pytest.raises(BadInput, match="train cannot be 'lroa'"):
        heal(made, [IDS], train="lroa")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="too short"):
        heal(made, [IDS[:1]])
    with pytest.raises(BadInput, match="tokenizer"):
        heal(made, "docstrings")
    with pytest.raises(BadInput, match="rate cannot be 0"):
        heal(made, [IDS], rate=0.0)


def test_divergence_is_kl_with_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    mine = torch.randn(3, 50, 7, generator=g).requires_grad_(True)
    theirs = torch.randn(3, 50, 7, generator=g)
    found = healing_loss.divergence(mine, theirs)
    (got,) = torch.autograd.grad(found * 2, mine)
    expected = torch.nn.functional.kl_div(
        mine.flatten(0, 1).log_softmax(-1), theirs.flatten(0, 1).log_softmax(-1),
        log_target=True, reduction="batchmean",
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected * 2, mine)[0])
