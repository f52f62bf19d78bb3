"""The timer of routing="auto": what it writes, what it runs, and how."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.codegen.onnx import chain, parity, timing, write
from sparsify.codegen.onnx.asked import Asked, counts
from sparsify.errors import BadInput
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.router import Router
from tests.unit.runtime.examples import SILU

pytest.importorskip("onnxruntime")
COPIES = 3


def layer() -> RoutedFFN:
    """Six experts of 8 neurons, the first shared; matrices large enough to be rounded."""
    torch.manual_seed(3)
    router = Router(torch.randn(5, 160), shared=1, rule="threshold")
    router.calibrate(torch.randn(64, 160))
    up, gate, down = (torch.randn(6, 8, 160) / 9 for _ in range(3))
    ffn = RoutedFFN(up, gate, down, None, None, None, activation=SILU, router=router)
    router.set_active(0.5)
    return ffn


@functools.cache
def made(way: str, weights: str, least: int) -> Any:
    """A chain of three; ``least`` is chain.LEAST, which some tests change."""
    assert least == chain.LEAST
    return chain.chained(layer(), way, COPIES, 21, weights)


def written(way: str, folder: Path, weights: str = "float32") -> Path:
    """It as a file."""
    return write.write(
        made(way, weights, chain.LEAST),
        folder / f"{way}-{weights}.onnx",
        external=None,
        force=False,
    )[0]


def drawn(tokens: int = 2) -> list[Tensor]:
    """x, and three selections."""
    return timing._drawn(layer(), 4, tokens, COPIES, torch.Generator().manual_seed(0))


def expected(way: str, flat: list[Tensor]) -> Tensor:
    """Each copy with a selection of its own, on what the last one gave."""
    y, timed = torch.zeros(()), chain.alone(layer(), way)
    for selected in flat[1:]:
        with torch.no_grad():
            y = timed(flat[0] + chain.SMALL * y.tanh(), selected)
    return y


@pytest.mark.parametrize("way", ["mask", "dense"])
def test_a_chain_is_the_layer_several_times(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With equal weights: see the next test."""
    monkeypatch.setattr(chain, "LEAST", 1 << 30)
    running = parity.session(written(way, tmp_path))
    flat = drawn()
    (found,) = parity.run(running, chain.input_names(COPIES), flat)
    assert float((found - expected(way, flat)).abs().max()) <= 1e-5


def test_copies_have_weights_that_are_not_equal(tmp_path: Path) -> None:
    """ONNX Runtime packs equal ones once, and would read them from the cache."""
    for way in ("branch", "moe"):
        model = made(way, "float32", chain.LEAST)
        held = [v.const_value for v in model.graph.initializers.values()]
        large = [t.numpy().tobytes() for t in held if t.size >= chain.LEAST]
        assert len(large) >= COPIES and len(set(large)) == len(large)


@pytest.mark.parametrize(
    ("weights", "operator"),
    [
        ("int4", "DequantizeLinear"),
        pytest.param("int8", "Dequantize", marks=pytest.mark.slow),
        pytest.param("float16", "Cast", marks=pytest.mark.slow),
    ],
)
def test_weights_are_stored_as_the_file_stores_them(
    weights: str, operator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the same rounding: a chain of them still computes nearly the same."""
    monkeypatch.setattr(chain, "LEAST", 1 << 30)
    made = chain.chained(layer(), "branch", COPIES, 21, weights)
    counted = sum(node.op_type.startswith(operator) for node in made.graph)
    assert counted % COPIES == 0 and counted >= COPIES * 3
    flat, whole = drawn(), written("branch", tmp_path)
    names = chain.input_names(COPIES)
    (exact,) = parity.run(parity.session(whole), names, flat)
    (found,) = parity.run(parity.session(written("branch", tmp_path, weights)), names, flat)
    error = float((found - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.2


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_every_copy_reads_codes_as_the_model_does(weights: str, tmp_path: Path) -> None:
    """As one operator with the product: what stands behind the last product must not hinder it."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(written("dense", tmp_path, weights)), options)
    graph = pytest.importorskip("onnx").load(tmp_path / "optimized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulNBits") == 3 * COPIES and "DequantizeLinear" not in kinds


def test_the_timer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ONNX Runtime, small: every form runs, at both budgets, the cache cleared before a call."""
    swept: list[int] = []
    monkeypatch.setattr(timing, "TURNS", 2)
    monkeypatch.setattr(timing, "WARM", 0.0)
    monkeypatch.setattr(timing, "TURN", 0.0)
    monkeypatch.setattr(timing, "_sweep", lambda: swept.append(1))
    ffn = layer()
    few, many = timing.measured(ffn, ["branch", "dense"], [2, 3], Asked(weights="int4", opset=21))
    assert set(few) == set(many) == {"branch", "dense"} and min(few.values()) > 0
    assert len(swept) == 2 * 2 * 2 * 2  # budgets, turns, ways, calls
    assert type(ffn) is RoutedFFN and not isinstance(ffn.router.threshold, torch.Tensor)


def test_a_large_layer_is_there_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small one as often as fills the buffer, at most eight times."""
    size = sum(p.numel() for p in layer().parameters()) * 4
    for buffer, copies in ((size, 1), (3 * size, 3), (99 * size, 8)):
        monkeypatch.setattr(timing, "BUFFER", buffer)
        folder = tmp_path / str(copies)
        folder.mkdir()
        assert timing.sessions(layer(), ["dense"], folder, Asked())["dense"].copies == copies


def test_threads_sleep_between_turns_and_not_inside(tmp_path: Path) -> None:
    """A session's threads that look for work take the cores from the next session."""
    folder = tmp_path / "timed"
    folder.mkdir()
    running = timing.sessions(layer(), ["dense"], folder, Asked(threads=2))["dense"]
    options = running.session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == 2
    with pytest.raises(RuntimeError):  # as by default: on
        options.get_session_config_entry("session.intra_op.allow_spinning")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 10_000])
def test_threads_that_cannot_be_timed(threads: Any) -> None:
    with pytest.raises(BadInput, match="threads cannot"):
        counts(1, threads, "auto")
    counts(1, None, "auto")
    counts(1, 10_000, "branch")  # of no meaning there, and no harm


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "2"])
def test_tokens_that_cannot_be_timed(tokens: Any) -> None:
    with pytest.raises(BadInput, match="tokens cannot be timed"):
        counts(tokens, 1, "mask")
