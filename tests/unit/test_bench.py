"""Timing models: what runs in which regime, what the ideal is, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import api
from sparsify.bench import Bench, Steps, kernels_of, put, reasons
from sparsify.bench_table import Benchmark, BenchRow, Regime
from sparsify.core import Remark
from sparsify.errors import BadInput
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.model import SparseModel
from sparsify.timing import Spread
from tests.contract.zoo_captures import captured

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def sparse() -> SparseModel:
    """zoo:llama with routed feed-forward layers."""
    return api.compile("zoo:llama", "ffn-moe{experts=4}", verify="off")


def rows_of(found: Benchmark) -> list[tuple[str, str, float | None]]:
    return [(row.regime, row.model, row.active) for row in found.rows]


def test_a_dense_model_and_a_pipeline() -> None:
    events: list[tuple[str, int, int]] = []
    found = api.bench(
        "zoo:llama", "ffn-moe{experts=4}", active=(1, 0.5), tokens=(1, 2, 12, 999), context=8,
        rounds=2, progress=lambda *event: events.append(event),
    )  # fmt: skip
    decode, batch = Regime(1, 1, 8).name, Regime(2, 1, 8).name
    prefill = Regime(1, 12).name
    models = [("dense", None), ("routed, eager", 1.0), ("routed, eager", 0.5)]
    left_out = ("routed, lowered", "dense projections")
    eager = [row for row in rows_of(found) if row[1] not in left_out]
    assert eager == [(r, *m) for r in (decode, batch, prefill) for m in models]
    for row in found.rows:
        assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
        assert row.base == (row.model == "dense")
        assert row.speedup.median == 1 if row.base else row.speedup.median > 0
        assert (row.ideal is None) == (row.active is None)
        if row.active is not None:
            assert row.realised == pytest.approx(row.active, abs=0.01)
    one, half = (r.ideal for r in found.rows[1:3])
    assert one == pytest.approx(1.0)
    assert half is not None and 1.0 < half < 2.0  # only a part of the model is halved
    assert "prefill of 999 tokens left out: the model has 256 positions" in found.notes
    assert any(note.startswith("torch.compile of the dense model was not") for note in found.notes)
    assert (decode, 3, 3) in events
    content = json.loads(json.dumps(found.to_dict()))
    assert content["format"] == "sparsify-bench"
    assert content["rows"][2]["of_ideal"] == pytest.approx(found.rows[2].of_ideal)
    assert content["machine"]["torch"] == str(torch.__version__)
    for width in (40, 100, 200):
        text = found.text(width)
        assert all(name in " ".join(text.split()) for name in (decode, batch, prefill))
        assert max(map(len, text.splitlines())) <= width


def test_a_saved_model_finds_its_dense_one(sparse: SparseModel, tmp_path: Path) -> None:
    sparse.save(tmp_path / "out")
    found = api.bench(tmp_path / "out", active=[0.5], tokens=[12], rounds=1)
    assert [row.model for row in found.rows][:2] == ["dense", "routed, eager"]
    assert found.rows[0].base
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    report["model"] = "./gone"
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    found = api.bench(tmp_path / "out", active=[0.5], tokens=[12], rounds=1)
    assert [(r.model, r.active, r.base) for r in found.rows][:2] == [
        ("routed, eager", 1.0, True), ("routed, eager", 0.5, False),
    ]  # fmt: skip
    assert any("./gone cannot be loaded again" in note for note in found.notes)
    assert "no dense model: the base is the routed model at its dense limit" in found.notes
    found = api.bench(tmp_path / "out", dense="zoo:llama", active=[0.5], tokens=[12], rounds=1)
    assert found.rows[0].model == "dense"


def test_a_model_that_is_another_now_is_no_base(sparse: SparseModel) -> None:
    import copy
    import dataclasses

    other = copy.deepcopy(sparse)
    other.report = dataclasses.replace(other.report, model="zoo:gpt2")
    found = api.bench(other, active=[0.5], tokens=[12], rounds=1)
    assert "dense" not in [row.model for row in found.rows]
    assert any("zoo:gpt2 is another model now" in note for note in found.notes)


@pytest.mark.parametrize("name", ["zoo:vit", "zoo:dit"])
def test_what_does_not_generate_runs_its_example(name: str) -> None:
    found = api.bench(name, "ffn-moe{experts=4}", active=[0.5], tokens=[1, 64], rounds=1)
    assert len({row.regime for row in found.rows}) == 1
    assert found.rows[0].regime.startswith("prefill of the example, ")
    assert found.rows[0].model == "dense"
    assert any("whatever --tokens says" in note for note in found.notes)
    if name == "zoo:vit":
        assert found.rows[0].tokens == 2 * 17  # two images of 16 patches and a class token


def test_wrong_values(sparse: SparseModel) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"active": [0.0]}, "is not a budget"),
        ({"tokens": [0]}, "tokens cannot be 0"),
        ({"tokens": []}, "tokens cannot be 0"),
        ({"context": 0}, "context cannot be 0"),
        ({"rounds": 0}, "rounds cannot be 0"),
        ({"pipeline": "ffn-moe"}, "takes no pipeline"),
        ({"tokens": [999]}, "nothing is left to measure"),
    ]
    for options, message in cases:
        with pytest.raises(BadInput, match=message):
            api.bench(sparse, **options)
    with pytest.raises(BadInput, match="needs a pipeline"):
        api.bench("zoo:llama")


# ---------------------------------------------------------------------------- kernels and dials


class Lowers(torch.nn.Module):
    """A kernel that counts its calls and declines."""

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.budget, self.calls = budget, 0

    def __call__(self, module: RoutedFFN, *inputs: torch.Tensor) -> None:
        assert module.router.active == pytest.approx(self.budget)
        self.calls += 1


def test_lowered_rows_run_the_kernels_of_their_budget(
    sparse: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager rows run none; dials and kernels are as before at the end, whatever happens."""
    made: list[Lowers] = []

    def lower(model: SparseModel) -> list[Remark]:
        budget = next(iter(model.active.values()))
        for module in kernels_of(model):
            if isinstance(module, RoutedFFN):
                kernel = Lowers(budget)
                object.__setattr__(module, "kernel", kernel.__call__)
                made.append(kernel)
        return [Remark("left", "x", "layer", "FeedForward", "dense is faster", "", "")] * 2

    monkeypatch.setattr(SparseModel, "lower", lower)
    before = dict(sparse.active), kernels_of(sparse)
    bench = Bench(sparse, {}, torch.arange(200) % 50)
    rows = list(bench.rows([Regime(1, 12)], [1.0, 0.5], 2))
    assert [(r.model, r.active) for r in rows] == [
        ("routed, eager", 1.0), ("routed, eager", 0.5),
        ("routed, lowered", 1.0), ("routed, lowered", 0.5), ("dense projections", None),
    ]  # fmt: skip
    assert [kernel.calls for kernel in made] == [4] * len(made)  # warm-up, two rounds, counting
    assert (dict(sparse.active), kernels_of(sparse)) == before
    layers = len(made) // 2
    said, tidied = bench.notes
    assert tidied.startswith("the graph was tidied for decoding: keys and values read without")
    assert said == (
        f"at 100%, 50% active, {layers} routed modules run lowered; dense is faster (2 times)"
    )

    def fails(model: SparseModel) -> None:
        lower(model)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(SparseModel, "lower", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        list(bench.rows([Regime(1, 12)], [0.5], 1))
    assert (dict(sparse.active), kernels_of(sparse)) == before


def test_without_a_code_generator(sparse: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(model: SparseModel) -> None:
        raise BadInput("this installation has no code generator")

    monkeypatch.setattr(SparseModel, "lower", lower)
    bench = Bench(sparse, {}, torch.arange(200) % 50)
    rows = list(bench.rows([Regime(1, 12)], [1.0], 1))
    assert [row.model for row in rows] == ["routed, eager", "dense projections"]
    assert bench.notes == ["not lowered: this installation has no code generator"]


def test_put_restores_kernels(sparse: SparseModel) -> None:
    kept = kernels_of(sparse)
    some = dict.fromkeys(kept, lambda module, x: None)
    put(some)
    assert kernels_of(sparse) == some
    put(kept)
    assert set(kernels_of(sparse).values()) == {None}


def test_reasons_are_counted() -> None:
    assert reasons(["a", "b", "a"]) == ["a (2 times)", "b"]
    assert reasons(None) == []


# ---------------------------------------------------------------------------- regimes and the ideal


def test_regimes() -> None:
    assert Regime.of(1, 128) == Regime(1, 1, 128)
    assert Regime.of(8, 128) == Regime(8, 1, 128)
    assert Regime.of(64, 128) == Regime(1, 64)
    assert Regime.of(1, 128).decodes and not Regime.of(9, 128).decodes


def test_decoding_steps_see_the_same_context_each(sparse: SparseModel) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []

    class Spy:
        def __call__(self, **given: Any) -> Any:
            past = given.get("past_key_values")
            before = past.get_seq_length() if past is not None else 0
            seen.append((tuple(given["input_ids"].flatten().tolist()), before))
            return sparse(**given)

    ids = torch.arange(200) % 50
    steps = Steps(Spy(), Regime(2, 1, 4), ids)
    with torch.no_grad():
        for _ in range(2):
            steps.prepare()
            steps.run()
    each = 4 + steps.count
    rows = ids[: 2 * each].view(2, each)
    assert seen[0] == (tuple(rows[:, :4].flatten().tolist()), 0)  # the context, once
    wanted = [(tuple(rows[:, 4 + i].tolist()), 4) for i in (0, *range(steps.count))]
    assert seen[1:] == wanted * 2


def test_only_the_timed_steps_are_compiled(sparse: SparseModel) -> None:
    """Another model fills the cache, so that its length is no shape to compile for."""
    seen: dict[str, list[int]] = {"compiled": [], "plain": []}

    def model(name: str) -> Any:
        def call(**given: Any) -> Any:
            seen[name].append(given["input_ids"].shape[1])
            return sparse(**given)

        return call

    dense = {"dense": model("plain"), "torch.compile": model("compiled")}
    bench = Bench(sparse, dense, torch.arange(200) % 50)
    steps = bench._steps(dense["torch.compile"], Regime(1, 1, 4))
    with torch.no_grad():
        steps.prepare()
        steps.run()
    assert seen["plain"] == [4]
    assert seen["compiled"] == [1] * (1 + steps.count)


def test_the_ideal_is_amdahls(sparse: SparseModel) -> None:
    """By hand: what is not a feed-forward layer stays, of the layers a half (and the router)."""
    bench = Bench(sparse, {}, torch.arange(10))
    ffns = [m for m in sparse.modules() if isinstance(m, RoutedFFN)]
    context = 10
    before = bench._facts(1.0, context)
    half = [m.cost(0.5) for m in ffns]
    whole = [m.cost(1.0) for m in ffns]
    saved = sum(a.bytes - b.bytes for a, b in zip(whole, half, strict=True))
    wanted = before.bytes_per_token / (before.bytes_per_token - saved)
    assert bench.ideal(Regime(1, 1, context), 0.5, 1.0)[1] == pytest.approx(wanted, rel=1e-6)
    work = bench._facts(1.0, context // 2).flops_per_token
    saved = sum(a.flops - b.flops for a, b in zip(whole, half, strict=True))
    ideal = bench.ideal(Regime(1, context), 0.5, 1.0)[1]
    assert ideal == pytest.approx(work / (work - saved), rel=1e-6)
    ideals = [bench.ideal(Regime(b, 1, context), 0.5, 1.0)[1] for b in (1, 2, 8)]
    assert ideals[0] > ideals[1] > ideals[2] >= 0.97  # more sequences read more of the experts


@pytest.mark.parametrize("pipeline", ["hidden-route", "ffn-moe,attn-moh"])
def test_attention_between_routed_projections_is_counted(pipeline: str) -> None:
    """Everything live costs what the dense model does, or the ideal would be above one."""
    routed = api.compile(captured("llama"), pipeline, verify="off", context=64)
    bench = Bench(routed, {}, torch.arange(10))
    for regime in (Regime(1, 1, 64), Regime(4, 1, 16), Regime(1, 100)):
        for ideal in bench.ideal(regime, 1.0, 0.6):
            assert ideal == pytest.approx(1.0, abs=1e-6)
    dense = routed.report.dense
    with torch.no_grad():
        found = bench._facts(1.0, 64)
    assert found.flops_per_token == pytest.approx(dense.flops_per_token, rel=1e-3)
    assert found.bytes_per_token == pytest.approx(dense.bytes_per_token, rel=1e-3)


def test_projections_of_one_input_are_timed_together() -> None:
    """As the dense model with the same kernels computes them."""
    sizes = lambda b: [[w.shape[0] for w in group] for group in b._groups]  # noqa: E731
    routed = api.compile(captured("llama"), "hidden-route", verify="off")
    bench = Bench(routed, {}, torch.arange(10))
    layer = sizes(bench)[: len(sizes(bench)) // 2]
    assert [len(group) for group in layer] == [3, 1, 2, 1]
    calls: list[int] = []

    class Product:
        def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> None:
            calls.append(1)

        def several(self, x: torch.Tensor, weights: list[torch.Tensor], biases: list[None]) -> None:
            calls.append(len(weights))

    bench._dense_projections(Regime(1, 1, 4), Product())()
    assert calls == [3, 1, 2, 1] * 2
    experts = Bench(api.compile(captured("llama"), "ffn-moe", verify="off"), {}, torch.arange(10))
    assert [len(group) for group in sizes(experts)] == [2, 1] * 2


def test_amdahl() -> None:
    """Half of 60 % of the time saved leaves 70 % of it."""
    routed = api.compile(captured("llama"), "ffn-moe{experts=8 router=top-k}", verify="off")
    bench = Bench(routed, {}, torch.arange(10))
    with torch.no_grad():
        full, _ = bench.ideal(Regime(1, 40), 0.5, 1.0)
        ideal, _ = bench.ideal(Regime(1, 40), 0.5, 0.6)
        nothing, _ = bench.ideal(Regime(1, 40), 0.5, 0.0)
    saved = 1 - 1 / full  # of the projections: half, less the router
    assert 0.4 < saved < 0.5
    assert ideal == pytest.approx(1 / (1 - 0.6 * saved))
    assert nothing == 1.0


def test_a_usual_table_fits_a_hundred_columns() -> None:
    slow, fast = Spread(12.345678, 11.0, 13.0), Spread(0.0123456, 0.011, 0.013)
    rows = [
        BenchRow("decode", 8, "torch.compile", None, None, slow, Spread(1.0, 1.0, 1.0), None, True),
        BenchRow("decode", 8, "routed, lowered", 0.75, 0.75, fast, Spread(12.5, 1.0, 1.0), 1.25),
    ]
    lines = Benchmark("m", "ffn-moe", tuple(rows), 9).text(100).splitlines()
    (head,) = (line for line in lines if line.endswith("of ideal"))
    assert len(head) <= 100
    (row,) = (line for line in lines if "routed, lowered" in line)
    assert row.split() == ("routed, lowered 75% 75% 12.35 11.00-13.00 648 12.50 1.25 1000%".split())


def test_of_ideal() -> None:
    one = Spread(1.0, 1.0, 1.0)
    row = BenchRow("r", 1, "routed, eager", 0.5, 0.5, one, Spread(1.5, 1.4, 1.6), 2.0)
    assert row.of_ideal == 0.75
    assert BenchRow("r", 1, "dense", None, None, one, one, None).of_ideal is None
