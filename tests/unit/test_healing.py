"""Healing on a tiny llama: it learns, resumes to the same weights, and never harms silently."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import healing, healing_loss
from sparsify.errors import BadCheckpoint, BadInput, OutputError
from sparsify.healing import heal
from sparsify.runtime.dial import routers
from sparsify.runtime.gated import GatedLinear
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.training import resettle
from tests.contract.zoo_captures import captured

IDS = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"steps": 8, "every": 4, "length": 16, "batch": 4}


@pytest.fixture(autouse=True)
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong here are the stand-ins, of a model with a few units only: they learn fast."""
    monkeypatch.setattr(healing, "RATES", {**healing.RATES, "routers": 1e-3, "stand-ins": 1e-3})


def model() -> Any:
    made = sparsify.compile(
        captured("llama"), "ffn-moe{experts=8}", calibration=[IDS[:8]], active=0.5, share=False
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


@pytest.mark.parametrize(
    ("train", "more"), [("routers", {"schedule": "cubic", "ramp": 0.9}), ("lora", {})]
)
def test_killed_and_resumed_is_the_straight_run(train: Any, more: Any, tmp_path: Path) -> None:
    straight = model()
    options = {**OPTIONS, **more}
    one = heal(straight, [IDS], train=train, **options)
    broken = model()
    before, dials = state(broken), broken.active

    def kill(event: str, done: int, total: int) -> None:
        if event == "heal" and done == 6:  # two steps after the checkpoint of step 4
            raise Killed

    folder = tmp_path / "ckpt"
    with pytest.raises(Killed):
        heal(broken, [IDS], train=train, checkpoint=folder, progress=kill, **options)
    assert all(torch.equal(t, before[n]) for n, t in state(broken).items())
    assert broken.active == dials
    assert [p.name for p in folder.iterdir()] == ["step-00004"]
    (folder / ".step-00008.abc.tmp").mkdir()  # as a SIGKILL while writing leaves it
    with pytest.raises(OutputError, match="unfinished"):
        heal(broken, [IDS], train=train, checkpoint=folder, **options)
    with pytest.raises(BadCheckpoint, match=r"rate=1.0 \(now 2.0\)"):
        heal(broken, [IDS], train=train, checkpoint=folder, resume=True, rate=2.0, **options)
    two = heal(broken, [IDS], train=train, checkpoint=folder, resume=True, **options)
    assert not folder.exists()
    mine, theirs = state(straight), state(broken)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert one.final == two.final
    assert [r["loss"] for r in one.steps] == [r["loss"] for r in two.steps]


def test_a_schedule_goes_from_dense_to_the_budget() -> None:
    made = model()
    before = [(p, m.setting) for p, m in routers(made)]
    found = heal(made, [IDS], train="routers", schedule="linear", start=0.9, ramp=0.5, **OPTIONS)
    budgets = [row["active"] for row in found.steps]
    assert budgets == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5])
    assert [(p, m.setting) for p, m in routers(made)] == before
    live = [row["live"] for row in found.evaluations]  # at the budget, whatever the schedule says
    assert max(live) < 0.65


def test_a_schedule_leaves_denser_routers_alone() -> None:
    made = model()
    made.set_active(0.5)
    made.set_active(0.9, at="*layers.0*")
    target = [m.active for _, m in routers(made)]
    found = heal(
        made, [IDS], train="routers", schedule="cosine", start=0.75, ramp=1.0,
        **{**OPTIONS, "steps": 2, "every": 2},
    )  # fmt: skip
    half = (0.75 + target[1]) / 2
    assert [row["active"] for row in found.steps] == pytest.approx(
        [(target[0] + 0.75) / 2, (target[0] + half) / 2]
    )
    assert [m.active for _, m in routers(made)] == target


def test_a_whole_schedule_starts_at_the_dense_limit() -> None:
    found = heal(model(), [IDS], train="lora", schedule="cubic", **OPTIONS)
    assert found.steps[0]["active"] == 1.0
    assert found.steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found.steps[-1]["active"] == 0.5


def test_balance_is_in_the_history_and_the_table() -> None:
    made = model()
    found = heal(made, [IDS], train="routers", rate=5.0, **OPTIONS)
    ids = IDS[-2:]  # what it measures on
    for row, counted in ((found.final, True), *((r, False) for r in found.evaluations)):
        facts = row["routers"]
        assert set(facts) == {f"model.layers.{n}.mlp.moe.router" for n in (0, 1)}
        assert row["dead_units"] == sum(f["dead"] for f in facts.values())
        for path, fact in facts.items():
            load = torch.tensor(fact["load"])
            share = load / load.sum()
            assert fact["entropy"] == pytest.approx(
                float(torch.distributions.Categorical(share).entropy() / math.log(len(load))),
                abs=1e-3,
            )
            assert fact["dead"] == int((load == 0).sum())
            if not counted or not found.improved:
                continue
            router = made.get_submodule(path)
            seen = []
            hook = router.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
            made(input_ids=ids, use_cache=False)
            hook.remove()
            mask = (seen[0] != 0).flatten(0, -2).double().mean(0)[router.shared :]
            assert fact["load"] == pytest.approx(mask.tolist(), abs=1e-4)
    table = found.text_table()
    assert "entropy" in table.splitlines()[0]
    assert "least even: model.layers." in table
    assert json.loads(json.dumps(found.to_dict()))["final"]["routers"]


def test_a_model_that_does_not_get_better_is_left_as_it_was() -> None:
    made = model()
    before = state(made)
    found = heal(made, [IDS], train="lora", rate=3000.0, **OPTIONS)
    assert not found.improved
    assert "did not improve" in found.summary()
    assert all(torch.equal(t, before[n]) for n, t in state(made).items())


def test_bad_calls() -> None:
    made = model()
    dials = made.active
    with pytest.raises(BadInput, match="train cannot be 'lroa'"):
        heal(made, [IDS], train="lroa")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="too short"):
        heal(made, [IDS[:1]])
    with pytest.raises(BadInput, match="tokenizer"):
        heal(made, "docstrings")
    with pytest.raises(BadInput, match="rate cannot be 0"):
        heal(made, [IDS], rate=0.0)
    with pytest.raises(BadInput, match="no schedule 'cubist'"):
        heal(made, [IDS], schedule="cubist")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="ramp cannot be 0"):
        heal(made, [IDS], schedule="linear", ramp=0.0)
    with pytest.raises(BadInput, match="does not go down"):
        heal(made, [IDS], schedule="linear", start=0.4, **OPTIONS)
    assert made.active == dials


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


# ---------------------------------------------------------------------------- hidden-route


def thinned(gated: bool = False) -> Any:
    text = "hidden-route{gated=true at=*.mlp.*}" if gated else "hidden-route{at=*.mlp.*}"
    made = sparsify.compile(
        captured("llama"), text, calibration=[IDS[:8]], active=0.5,
        share=False,
    )  # fmt: skip
    with torch.no_grad():  # centres that are plainly wrong; the dense limit is as it was
        for module in made.modules():
            if isinstance(module, RoutedLinear):
                assert module.select.centre is not None
                module.select.centre.add_(0.3)
                module.retie()
    resettle(made, lambda: made(input_ids=IDS, use_cache=False))
    return made


def projections(made: Any) -> dict[str, RoutedLinear]:
    return {n: m for n, m in made.named_modules() if isinstance(m, RoutedLinear)}


@pytest.mark.parametrize(
    ("train", "rate", "gated"),
    [
        ("routers", 30.0, False),
        ("routers", 30.0, True),
        ("lora", 3.0, False),
        ("routed", 30.0, False),
        ("routed", 30.0, True),
        ("all", 30.0, False),
    ],
)
def test_projections_heal_and_stay_whole(
    train: Any, rate: float, gated: bool, tmp_path: Path
) -> None:
    made = thinned(gated)
    before = state(made)
    wanted = made(input_ids=IDS, use_cache=False)
    found = heal(made, [IDS], train=train, rate=rate, **OPTIONS)
    assert found.improved
    assert found.final["kl"] < found.start["kl"]
    assert found.final["live"] == pytest.approx(found.start["live"], abs=0.03)
    changed = {n for n, t in state(made).items() if not torch.equal(t, before[n])}
    assert any(n.endswith("select.centre") for n in changed)
    assert any(n.endswith("usual") for n in changed) == gated
    assert any(n.endswith("columns") for n in changed) == (train != "routers")
    assert any("q_proj" in n for n in changed) == (train == "all")
    for module in projections(made).values():  # the offset is still that of centre and columns
        assert module.offset is not None and module.select.centre is not None
        torch.testing.assert_close(module.offset, module.select.centre @ module.columns)
        assert not module.select.centre.requires_grad
        assert not isinstance(module, GatedLinear) or not module.usual.requires_grad
    assert sparsify.verify(made).ok
    if train == "routers":  # the dense limit is the one before
        made.set_active(1.0)
        whole = thinned(gated)
        whole.set_active(1.0)
        torch.testing.assert_close(
            made(input_ids=IDS, use_cache=False), whole(input_ids=IDS, use_cache=False)
        )
        made.set_active(0.5)
    assert not torch.equal(made(input_ids=IDS, use_cache=False).logits, wanted.logits)
    made.save(tmp_path / "healed")
    again = sparsify.load(tmp_path / "healed")
    assert torch.equal(
        again(input_ids=IDS, use_cache=False).logits, made(input_ids=IDS, use_cache=False).logits
    )


def test_projections_that_do_not_get_better_are_as_they_were() -> None:
    made = thinned()
    before = state(made)
    found = heal(made, [IDS], train="routed", rate=1e5, **OPTIONS)
    assert not found.improved
    assert all(torch.equal(t, before[n]) for n, t in state(made).items())


def test_projections_resume_to_the_straight_run(tmp_path: Path) -> None:
    straight, broken = thinned(), thinned()
    heal(straight, [IDS], train="routed", rate=10.0, **OPTIONS)

    def kill(event: str, done: int, total: int) -> None:
        if event == "heal" and done == 6:
            raise Killed

    options = {**OPTIONS, "train": "routed", "rate": 10.0, "checkpoint": tmp_path / "c"}
    with pytest.raises(Killed):
        heal(broken, [IDS], progress=kill, **options)
    heal(broken, [IDS], resume=True, **options)
    mine, theirs = state(straight), state(broken)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_half_trains_in_bfloat16_and_keeps_float32() -> None:
    made, seen = thinned(), set[tuple[bool, bool]]()
    projection = next(iter(projections(made).values()))
    hook = projection.register_forward_hook(
        lambda m, i, o: seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    found = heal(made, [IDS], train="routed", rate=30.0, half=True, **OPTIONS)
    hook.remove()
    assert (True, True) in seen  # steps
    assert (False, False) in seen  # measures
    assert (True, False) not in seen
    assert found.improved
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert found.final["kl"] < found.start["kl"]


def test_a_huge_token_counts_as_a_usual_one() -> None:
    g = torch.Generator().manual_seed(0)
    theirs = torch.randn(2, 9, 8, generator=g)
    theirs[:, 0] *= 1000.0  # an attention sink
    others = theirs.clone()
    others[:, 1:] *= 1.1  # 1 % of what they are, squared
    found = healing_loss.relative_error({"a": others}, {"a": theirs})
    assert 0.008 < float(found) < 0.01  # by plain sums 1e-7
    sink = theirs.clone()
    sink[:, 0] *= 1.1
    assert float(healing_loss.relative_error({"a": sink}, {"a": theirs})) < 0.002
    same = torch.ones(1, 4, 8)  # none is above the median: plain sums
    found = healing_loss.relative_error({"a": same * 1.1}, {"a": same})
    assert float(found) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_thresholds_of_projections_are_fitted_anew(gated: bool) -> None:
    made = thinned(gated)  # with centres moved, then resettled on IDS
    seen: dict[str, float] = {}
    for path, module in made.named_modules():
        if isinstance(module, Magnitude):
            module.register_forward_hook(
                lambda m, i, o, path=path: seen.update({path: float(o.float().mean())})
            )
    made(input_ids=IDS, use_cache=False)
    for path, share in seen.items():
        router = made.get_submodule(path)
        assert share == pytest.approx(router.budget / router.routed, abs=0.002)
    kinds = {path.rpartition(".")[2] for path in seen}
    assert kinds == ({"select", "neurons"} if gated else {"select"})
