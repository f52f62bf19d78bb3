"""routing="auto": told timings decide, dials come back, and the file is what was decided."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify.codegen.onnx import choice, live, targets, timing, trace
from sparsify.codegen.onnx import export as exporting
from sparsify.codegen.onnx.asked import Asked
from sparsify.errors import BadInput, ParityFailed
from sparsify.runtime import dial
from sparsify.runtime.ffn import RoutedFFN
from tests.contract.zoo_captures import captured

pytest.importorskip("onnxruntime")
AUTO = Asked("portable", "auto")
MLP = "model.layers.{}.mlp"


@functools.cache
def compiled() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsify.compile(captured("llama"), "ffn-moe{experts=4},attn-moh", reproducer=None)


@pytest.fixture
def model() -> Any:
    """zoo:llama at 0.5, its second feed-forward layer at 0.75."""
    made = copy.deepcopy(compiled())
    made.set_active(0.5)
    made.set_active(0.75, at=MLP.format(1))
    return made


def tell(monkeypatch: pytest.MonkeyPatch, **times: Sequence[float]) -> list[Any]:
    """Let the timer say these milliseconds, at the fewest and the most live experts: by budget."""
    asked: list[Any] = []

    def measured(ffn: RoutedFFN, ways: Sequence[str], lives: Sequence[int], of: Asked) -> Any:
        asked.append((list(ways), list(lives), of))
        return [{way: times[way][at] for way in ways} for at in range(len(lives))]

    monkeypatch.setattr(timing, "measured", measured)
    monkeypatch.setattr(live, "shares", lambda _: {})
    return asked


def test_the_fastest_form_or_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tell(monkeypatch, dense=(10, 10), mask=(12, 12), branch=(6, 11), moe=(7, 10.5))
    before = {path: router.setting for path, router in dial.routers(model)}
    given = Asked("ort", "auto", tokens=3, threads=2)
    with choice.chosen(model, given) as how:
        assert asked == [(["mask", "branch", "moe", "dense"], [2, 3], given)]
        first, second = how.choices
        assert (first.path, first.way, second.way) == (MLP.format(0), "branch", "dense")
        assert first.reason == "in branches (0.60x of the dense layer's time at 3 tokens on 2 threads in ONNX Runtime)"  # fmt: skip  # noqa: E501
        assert second.reason == "dense (routed would take 1.05x of its time at 3 tokens on 2 threads in ONNX Runtime)"  # fmt: skip  # noqa: E501
        assert [r.kind for r in (first.remark, second.remark)] == ["applied", "left"]
        graph = trace.formed(model, how.way, how.ways)
        assert trace.told(graph)["RoutedFFN in branches"] == 1
        assert trace.told(graph)["RoutedFFN dense"] == 1
        assert trace.told(graph)["RoutedRows by masks"] == 2
    assert {path: router.setting for path, router in dial.routers(model)} == before


def test_layers_between_two_budgets_lie_on_a_line(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, dense=(10, 10), mask=(20, 20), branch=(8, 12))
    routers = [r for p, r in dial.routers(model, pass_name="ffn-moe")]
    routers[0].set_active(0.5)
    routers[1].set_active(1.0)
    with choice.chosen(model, AUTO) as how:
        assert [c.module for c in how.choices] == [f"{MLP.format(0)}.moe"]  # dense already
    assert choice._between([2, 3], [{"branch": 8.0}, {"branch": 12.0}], 2.25) == {"branch": 9.0}
    assert choice._between([2], [{"branch": 8.0}], 2.25) == {"branch": 8.0}


def test_no_gain_that_timing_cannot_tell_from_none(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, dense=(10, 10), mask=(9.9, 9.9), branch=(9.8, 9.8))
    with choice.chosen(model, AUTO) as how:
        assert {c.way for c in how.choices} == {"dense"}


def test_weights_that_are_not_one_have_no_dense_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sparsify.compile(
            captured("nanogpt"), "ffn-moe{experts=4 router=sigmoid-top-k weights=scaled}",
            reproducer=None,
        )  # fmt: skip
    model.set_active(0.5)
    asked = tell(monkeypatch, mask=(9, 9), branch=(8, 8))
    with choice.chosen(model, AUTO) as how:
        assert asked[0][0] == ["mask", "branch"]
        assert how.choices[0].reason == "in branches (the fastest of its forms at 1 token on 1 thread in ONNX Runtime; it has no dense one)"  # fmt: skip  # noqa: E501


def test_the_file_is_held_against_the_model_as_chosen(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tell(monkeypatch, dense=(10, 10), mask=(12, 12), branch=(11, 11), moe=(7, 10.5))
    before = model.active
    found = model.export(tmp_path / "a.onnx", target="ort")
    assert all(case.ok for case in found.cases)
    assert found.operators["MoE"] == 1
    assert found.forms["RoutedFFN dense"] == found.forms["RoutedFFN as com.microsoft MoE"] == 1
    assert f"{MLP.format(1)}: dense (routed would take 1.05x" in found.text()
    assert found.to_dict()["choices"][1]["milliseconds"]["dense"] == 10
    assert [r.region for r in found.remarks] == [MLP.format(0), MLP.format(1)]
    turned = f"{MLP.format(1)}.moe.router"
    assert found.active == {**before, turned: 1.0} and model.active == before


def test_dials_come_back_after_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tell(monkeypatch, dense=(1, 1), mask=(2, 2), branch=(3, 3))
    monkeypatch.setattr(exporting.trace, "traced", lambda *_: object())
    before = model.active

    def fail(*_: Any) -> Any:
        assert model.active != before
        raise ParityFailed("no")

    monkeypatch.setattr(exporting.translate, "translated", fail)
    with pytest.raises(ParityFailed):
        model.export(tmp_path / "a.onnx", routing="auto")
    assert model.active == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["a.onnx", "served/"])
def test_what_was_asked_for_is_what_is_timed(
    place: str, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def enough(*_: Any) -> Any:
        raise ParityFailed("enough")

    asked = tell(monkeypatch, dense=(10, 10), mask=(12, 12), branch=(6, 11), moe=(7, 12))
    monkeypatch.setattr(exporting.trace, "formed", enough)
    options: dict[str, Any] = {"target": "ort", "tokens": 4, "threads": 1, "weights": "int4"}
    with pytest.raises(ParityFailed):
        model.export(f"{tmp_path}/{place}", **options)
    ways = ["mask", "branch", "moe", "dense"]
    assert asked == [(ways, [2, 3], Asked("ort", "auto", 23, "int4", 4, 1))]
    with pytest.raises(BadInput, match="0 threads"):
        model.export(f"{tmp_path}/{place}", **{**options, "threads": 0})
    assert list(tmp_path.iterdir()) == []


def test_layers_in_one_form_are_one_line() -> None:
    def chose(path: str, way: str, routed: float) -> choice.Choice:
        return choice.Choice(path, f"{path}.moe", way, {"dense": 1.0, "mask": routed}, AUTO)

    found = (chose("0.mlp", "dense", 2), chose("1.mlp", "mask", 0.5), chose("2.mlp", "dense", 1.5),
             chose("3.mlp", "dense", 1.75))  # fmt: skip
    dense, mask = choice.told(found)
    at = "at 1 token on 1 thread in ONNX Runtime"
    assert dense == f"0.mlp and 2 more: dense (routed would take 1.50x to 2.00x of its time {at})"
    assert mask == f"1.mlp: by masks (0.50x of the dense layer's time {at})"


def test_layers_are_timed_with_the_experts_that_are_live_in_use(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tell(monkeypatch, dense=(10, 10), mask=(20, 20), branch=(8, 12))
    shares = {f"{MLP.format(0)}.moe": 0.3, f"{MLP.format(1)}.moe": 0.9}
    monkeypatch.setattr(live, "shares", lambda _: shares)
    with choice.chosen(model, AUTO) as how:
        assert asked[0][1] == [1, 4]  # by budgets 2 and 3
        assert [c.way for c in how.choices] == ["branch", "dense"]
        assert how.choices[0].to_dict()["live"] == 1.2


def test_live_experts_are_counted_while_the_model_writes(model: Any) -> None:
    """The budget's number where rules count, the counters as before, twice the same."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model(ids)
    before, settings = model.realised(), model.active
    found = live.shares(model)
    assert found[f"{MLP.format(0)}.moe"] == 0.5 and found[f"{MLP.format(1)}.moe"] == 0.75
    assert live.shares(model) == found
    assert model.realised() == before and model.active == settings


def test_live_experts_of_other_models_are_told_by_budgets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = sparsify.compile(captured("vit"), "ffn-moe{experts=4}", reproducer=None)
    assert live.shares(other) == {}


def test_what_is_not_on_offer() -> None:
    with pytest.raises(BadInput, match="has no routing 'moe'"):
        targets.check("portable", "moe", None)
    assert targets.check("ort", "moe", None) == targets.OPSET_ORT == 23
    assert (targets.routing("ort", None), targets.routing("portable", None)) == ("auto", "mask")
    assert targets.routing("ort", "branch") == "branch"
    with pytest.raises(BadInput, match="0 tokens"):
        compiled().export("never.onnx", tokens=0)
