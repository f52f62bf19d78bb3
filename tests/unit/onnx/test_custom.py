"""Operators of our own for ONNX Runtime: on any processor, in any session, or a clear no."""

from __future__ import annotations

import ctypes
import json
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify.codegen.cpu.build import NoCompiler
from sparsify.codegen.onnx import parity, translate, write
from sparsify.codegen.onnx.custom import build
from sparsify.codegen.onnx.custom.files import beside, known
from sparsify.codegen.onnx.custom.source import PRODUCT, Kind
from sparsify.codegen.onnx.forms import into_forms
from sparsify.codegen.onnx.trace import silenced
from sparsify.errors import BadInput, OutputError
from sparsify.runtime.calling import ModuleCall, Slot
from sparsify.runtime.heads import RoutedColumns
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from tests.unit.onnx.models import llama, needs_compiler
from tests.unit.runtime.examples import SILU

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")
EXPERTS, SIZE, WIDTH = 4, 37, 40  # no multiples of anything
NAMES = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias", "dropped")


def weights(seed: int = 0) -> dict[str, Any]:
    """Of a gated layer with biases and stand-ins."""
    draw = np.random.default_rng(seed)
    packed, rows = (EXPERTS, SIZE, WIDTH), (EXPERTS, SIZE)
    shapes = (packed, packed, packed, rows, rows, (WIDTH,), (EXPERTS - 1, WIDTH))
    sizes = zip(NAMES, shapes, strict=True)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in sizes}


def one_layer(tensors: dict[str, Any], experts: int = EXPERTS) -> Any:
    """x (..., D), select (..., N) -> the operator's y."""
    kinds = ir.TensorType(ir.DataType.FLOAT)
    x, select = (
        ir.Value(name=name, shape=ir.Shape(["B", "T", size]), type=kinds)
        for name, size in (("x", WIDTH), ("select", EXPERTS))
    )
    held = [ir.Value(name=n, const_value=ir.tensor(t, name=n)) for n, t in tensors.items()]
    node = ir.node(
        known(Kind.of(SILU)), [x, select, *held], {"experts": experts, "neurons": SIZE},
        domain="sparsify",
    )  # fmt: skip
    node.outputs[0].name, node.outputs[0].type = "y", kinds
    imports = {"": 20, "sparsify": 1}
    graph = ir.Graph(
        [x, select], node.outputs, nodes=[node], initializers=held, opset_imports=imports
    )
    return ir.Model(graph, ir_version=10)


def expected(t: dict[str, Any], x: Any, select: Any) -> Any:
    """float64, one expert after the other."""
    x, select = x.astype(np.float64), select.astype(np.float64)
    y = np.zeros(x.shape) + t["down_bias"]
    for e in range(EXPERTS):
        gate = x @ t["gate"][e].T + t["gate_bias"][e]
        hidden = gate / (1 + np.exp(-gate)) * (x @ t["up"][e].T + t["up_bias"][e])
        share = select[..., e : e + 1]
        instead = t["dropped"][e - 1] if e else 0  # of the last three
        y += np.where(share != 0, share * (hidden @ t["down"][e]), instead)
    return y


def inputs(tokens: int, seed: int = 1) -> tuple[Any, Any]:
    """x (1, T, D) and weights (1, T, N), two of four experts dead, and all of the last token's."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((1, tokens, WIDTH)).astype(np.float32)
    select = draw.uniform(0.5, 2, (1, tokens, EXPERTS)) * (draw.random((1, tokens, EXPERTS)) < 0.5)
    if tokens > 1:
        select[0, -1] = 0
    return x, select.astype(np.float32)


def holds(running: Any, tensors: dict[str, Any], tokens: int, seed: int = 1) -> None:
    x, select = inputs(tokens, seed)
    (found,) = running.run(None, {"x": x, "select": select})
    wanted = expected(tensors, x, select)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layer, its library beside it."""
    needs_compiler()
    path = tmp_path_factory.mktemp("custom") / "layer.onnx"
    files = write.write(one_layer(weights()), path, external=None, force=False)
    assert [f.name for f in files] == ["layer.onnx", "layer.onnx.so", "layer.onnx.c"]
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_tokens(file: Path, threads: int) -> None:
    running = parity.session(file, threads=threads)
    for tokens in (1, 2, 7, 16, 17, 100, 5000):  # few, many, more than a slice
        holds(running, weights(), tokens)
    (none,) = running.run(None, dict(zip(("x", "select"), inputs(0), strict=True)))
    assert none.shape == (1, 0, WIDTH)


def test_calls_at_once(file: Path) -> None:
    """Sessions are called by several threads: nothing of a call is anybody else's."""
    running, failed = parity.session(file, threads=2), list[BaseException]()

    def calls(seed: int) -> None:
        try:
            for tokens in (1, 30, 3, 200, 16) * 4:
                holds(running, weights(), tokens, seed)
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=calls, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed


@pytest.mark.slow
def test_the_source_says_how_it_is_built_and_fits_any_processor(file: Path, tmp_path: Path) -> None:
    """The commands at its head build it; each width of vectors computes the same."""
    shutil.copy(file, tmp_path / "model.onnx")
    shutil.copy(beside(file)[1], tmp_path / "model.onnx.c")
    text = (tmp_path / "model.onnx.c").read_text()
    lines = [line.removeprefix(" *   ") for line in text.split("*/")[0].splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("cc ")]
    assert len(commands) >= 3
    compiler = build._compiler().command
    for command in commands:
        subprocess.run([*compiler, *command[1:]], check=True, cwd=tmp_path)
    holds(parity.session(tmp_path / "model.onnx"), weights(), 20)
    for widest in (8, 4):
        place = tmp_path / f"widest-{widest}"
        place.mkdir()
        shutil.copy(file, place / "model.onnx")
        main, link = commands[0][1:], commands[-1][1:]
        subprocess.run([*compiler, f"-DWIDEST={widest}", *main], check=True, cwd=tmp_path)
        subprocess.run([*compiler, *link], check=True, cwd=tmp_path)
        shutil.move(tmp_path / "model.onnx.so", place)
        running = parity.session(place / "model.onnx", threads=2)
        for tokens in (1, 5, 40):
            holds(running, weights(), tokens)


def test_runs_without_torch_and_without_openmp(file: Path) -> None:
    code = f"""
import sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.register_custom_ops_library({str(beside(file)[0])!r})
running = ort.InferenceSession({str(file)!r}, options)
x, select = np.ones((1, 2, {WIDTH}), np.float32), np.ones((1, 2, {EXPERTS}), np.float32)
assert running.run(None, {{"x": x, "select": select}})[0].shape == x.shape
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "torch" not in sys.modules and "libgomp" not in maps
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inputs_that_do_not_fit_are_refused(file: Path, tmp_path: Path) -> None:
    """With a message, not a crash."""
    running = parity.session(file)
    x, select = inputs(3)
    with pytest.raises(Exception, match="input 1 of a routed layer has 8 numbers, not 12"):
        running.run(None, {"x": x, "select": select[:, :2]})
    more = weights() | {"dropped": np.zeros((EXPERTS + 1, WIDTH), np.float32)}
    write.write(one_layer(more), tmp_path / "c.onnx", external=None, force=False)
    with pytest.raises(Exception, match="input 8 of a routed layer has 200 numbers, not 160"):
        parity.session(tmp_path / "c.onnx").run(None, {"x": x, "select": select})
    write.write(one_layer(weights(), experts=5), tmp_path / "a.onnx", external=None, force=False)
    with pytest.raises(Exception, match="input 1 of a routed layer has 12 numbers, not 15"):
        parity.session(tmp_path / "a.onnx").run(None, {"x": x, "select": select})
    write.write(one_layer(weights(), experts=0), tmp_path / "b.onnx", external=None, force=False)
    with pytest.raises(Exception, match="needs experts and neurons"):
        parity.session(tmp_path / "b.onnx")


def test_an_older_runtime_is_told(file: Path) -> None:
    """Registration asks for the interface that it was written for, and crashes with no other."""
    said: list[bytes] = []
    create = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: said.append(text) or 1  # type: ignore[func-returns-value]
    )
    old = (ctypes.c_void_p * 100)(ctypes.cast(create, ctypes.c_void_p))
    get = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_uint32)(
        lambda version: 0 if version > 16 else ctypes.addressof(old)
    )
    text = ctypes.create_string_buffer(b"1.16.3")
    name = ctypes.CFUNCTYPE(ctypes.c_ssize_t)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get, ctypes.c_void_p), ctypes.cast(name, ctypes.c_void_p)
    )
    register = ctypes.CDLL(str(beside(file)[0])).RegisterCustomOps
    register.argtypes, register.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_void_p
    assert register(None, ctypes.addressof(base))
    assert said == [b"this library of operators needs ONNX Runtime 1.17 or later, not 1.16.3"]


# ------------------------------------------------------------------------------------- products


@pytest.fixture(scope="module")
def two_products(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """x (..., 50) -> x @ a (50, 33), x @ b (50, 3000); the matrices."""
    needs_compiler()
    draw, kinds = np.random.default_rng(0), ir.TensorType(ir.DataType.FLOAT)
    a, b = (draw.standard_normal((50, n)).astype(np.float32) for n in (33, 3000))
    x = ir.Value(name="x", shape=ir.Shape(["B", "T", 50]), type=kinds)
    held = [ir.Value(name=n, const_value=ir.tensor(t, name=n)) for n, t in (("a", a), ("b", b))]
    nodes = [ir.node(known(PRODUCT), [x, matrix], domain="sparsify") for matrix in held]
    for node, name in zip(nodes, ("y", "z"), strict=True):
        node.outputs[0].name, node.outputs[0].type = name, kinds
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=held,
        opset_imports={"": 20, "sparsify": 1},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("product") / "product.onnx"
    write.write(ir.Model(graph, ir_version=10), path, external=None, force=False)
    return path, a, b


@pytest.mark.parametrize("threads", [1, 2])
def test_products_skip_zeros(two_products: tuple[Path, Any, Any], threads: int) -> None:
    path, *matrices = two_products
    running, draw = parity.session(path, threads=threads), np.random.default_rng(2)
    for tokens in (1, 2, 8, 9, 100, 0):
        x = draw.standard_normal((2, tokens, 50)) * (draw.random((2, tokens, 50)) < 0.4)
        x[:, 1:2] = 0
        for found, matrix in zip(
            running.run(None, {"x": x.astype(np.float32)}), matrices, strict=True
        ):
            wanted = x @ matrix.astype(np.float64)
            assert found.shape == wanted.shape
            assert not wanted.size or np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_products_read_no_rows_of_zeros_and_keep_what_is_no_number(tmp_path: Path) -> None:
    needs_compiler()
    kinds = ir.TensorType(ir.DataType.FLOAT)
    x, matrix = (
        ir.Value(name=name, shape=ir.Shape([None, None]), type=kinds) for name in ("x", "matrix")
    )
    node = ir.node(known(PRODUCT), [x, matrix], domain="sparsify")
    node.outputs[0].name, node.outputs[0].type = "y", kinds
    imports = {"": 20, "sparsify": 1}
    graph = ir.Graph([x, matrix], node.outputs, nodes=[node], opset_imports=imports)
    write.write(ir.Model(graph, ir_version=10), tmp_path / "a.onnx", external=None, force=False)
    running = parity.session(tmp_path / "a.onnx")
    rows, dead = np.ones((40, 8), np.float32), np.ones((3, 40), np.float32)
    dead[:, 7] = 0
    rows[7] = np.inf  # in a sum this would be NaN
    assert np.array_equal(running.run(None, {"x": dead, "matrix": rows})[0], np.full((3, 8), 39.0))
    dead[1, 3] = np.nan
    found = running.run(None, {"x": dead, "matrix": rows})[0]
    assert np.isnan(found[1]).all() and np.array_equal(found[0], np.full(8, 39.0))
    with pytest.raises(Exception, match="sizes of a product's inputs do not fit"):
        running.run(None, {"x": dead, "matrix": rows[:5]})


# ---------------------------------------------------------------------------------- as a target


def test_a_model_is_held_with_its_library(tmp_path: Path) -> None:
    """In a folder for clients; its large weights in half, which the operators read, too."""
    needs_compiler()
    options = {"target": "ort-custom", "routing": "custom", "weights": "float16"}
    made = llama().export(f"{tmp_path}/served/", **options)
    folder, names = tmp_path / "served", ["model.onnx", "model.onnx.so", "model.onnx.c"]
    assert [f.name for f in made.files] == names and all(f.exists() for f in made.files)
    assert not set(names) & set(made.beside)
    genai = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert genai["session_options"]["custom_ops_library"] == "model.onnx.so"
    for kind in ("RoutedFFN", "RoutedColumns"):
        assert made.forms[f"{kind} as an operator of our own"] == 2
    assert {case.against for case in made.cases} > {"model"} and all(c.ok for c in made.cases)
    held = ir.load(folder / "model.onnx").graph.initializers.values()
    sizes = [value.const_value.size for value in held if value.dtype == ir.DataType.FLOAT]
    assert max(sizes) < 1024  # "small", or a router's
    assert "model.onnx.so has to be registered" in made.text()
    with pytest.raises(Exception, match="is not a registered"):  # no crash
        ort.InferenceSession(str(folder / "model.onnx"))


class Projections(nn.Module):
    """By threshold, by count, with centres; sums over live units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, rule, centre in (("cut", "threshold", None), ("best", "top-k", torch.randn(48))):
            select = Magnitude(torch.rand(48) + 0.5, centre, rule=rule)
            select.calibrate(torch.randn(64, 48))
            select.set_active(0.5)
            setattr(self, name, RoutedLinear(torch.randn(48, 20), torch.randn(20), select))
        blocks, dropped = torch.randn(6, 8, 20), torch.randn(6, 20)
        self.units = RoutedColumns(blocks, torch.randn(20), dropped=dropped)

    def forward(self, x: Tensor, select: Tensor) -> tuple[Tensor, ...]:
        return self.cut(x), self.best(x), self.units(x, select)


def test_projections(tmp_path: Path) -> None:
    needs_compiler()
    eager, formed, free = Projections().eval(), Projections().eval(), torch.export.Dim.AUTO
    into_forms(formed, "custom")
    example = torch.randn(2, 3, 48), torch.ones(2, 3, 6)
    with torch.no_grad(), silenced():
        open_ = {0: free, 1: free}
        traced = torch.export.export(formed, example, dynamic_shapes=(open_, open_), strict=False)
    slots = (Slot("x", (None, None, 48)), Slot("select", (None, None, 6)))
    tree = {"kind": "tuple", "items": [{"kind": "tensor"}] * 3}
    call = ModuleCall(slots, ("x", "select"), {}, tree)
    model = translate.translated(traced, call, 20, "ort-custom")
    assert sum(node.op_type == "SkippingMatMul" for node in model.graph) == 3
    write.write(model, tmp_path / "a.onnx", external=None, force=False)
    running = parity.session(tmp_path / "a.onnx", threads=2)
    for batch, tokens in ((1, 1), (1, 3), (2, 2), (3, 20)):
        flat = torch.randn(batch, tokens, 48), (torch.rand(batch, tokens, 6) < 0.5).float()
        with torch.no_grad():
            wanted = eager(*flat)
        for a, b in zip(parity.run(running, ("x", "select"), flat), wanted, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_a_file_without_operators_of_ours_has_no_library(tmp_path: Path) -> None:
    needs_compiler()
    place, model = tmp_path / "a.onnx", one_layer(weights())
    write.write(model, place, external=None, force=False)
    model.graph.outputs[0] = model.graph.inputs[0]
    model.graph.remove(list(model.graph))
    assert write.write(model, place, external=None, force=True) == (place,)
    assert list(tmp_path.iterdir()) == [place]  # nothing of the one before


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is traced; what was there stays."""
    (tmp_path / "a.onnx").write_bytes(b"kept")
    monkeypatch.setenv("CC", "nothing-of-that-name")
    with pytest.raises(NoCompiler, match="operators for ONNX Runtime cannot be built") as refused:
        llama().export(tmp_path / "a.onnx", target="ort-custom", force=True)
    assert "target 'ort'" in str(refused.value.help)
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_bytes() == b"kept"


def test_what_is_not_on_offer(tmp_path: Path) -> None:
    for target in ("portable", "ort"):
        with pytest.raises(BadInput, match=f"target '{target}' has no routing 'custom'"):
            llama().export(tmp_path / "a.onnx", target=target, routing="custom")
    with pytest.raises(BadInput, match="routing 'custom' has no weights in int8"):
        llama().export(tmp_path / "a.onnx", target="ort-custom", routing="custom", weights="int8")


def test_the_library_is_written_with_the_file_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()

    def full(self: Path, text: str, encoding: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"cannot write .*a\.onnx"):
        write.write(one_layer(weights()), tmp_path / "a.onnx", external=None, force=False)
    assert not list(tmp_path.iterdir())
