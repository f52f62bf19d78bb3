"""Rounded matrices, and small graphs whose weights are replaced by codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsify.codegen.onnx.codes_in_graph import put_codes
from sparsify.codegen.onnx.rounding import rounded
from sparsify.codegen.onnx.views import unviewed, uses_of, viewed
from sparsify.codegen.onnx.weights import planned, put_values
from sparsify.runtime.router import Router

ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
K, N = 80, 48  # K is no multiple of a block


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e9])
@pytest.mark.parametrize(("bits", "blocks"), [(8, 1), (4, 3)])
def test_codes_times_scales_are_the_values_and_near(bits: int, blocks: int, size: float) -> None:
    matrix = numbers(K, N) * np.float32(size)
    found = rounded(matrix, bits)
    assert found.codes.dtype == np.int8 and np.abs(found.codes).max() <= 2 ** (bits - 1) - 1
    assert found.scales.shape == (blocks, N)
    wide = np.repeat(found.scales.astype(np.float32), K if bits == 8 else 32, axis=0)[:K]
    assert np.array_equal(found.codes * wide, found.values)
    error = np.abs(found.values - matrix)
    assert np.sqrt((error**2).mean()) <= (0.008 if bits == 8 else 0.12) * size
    inside = np.abs(matrix) < (2 ** (bits - 1) - 1) * wide  # others are clipped
    assert (error[inside] <= 0.5001 * wide[inside]).all()


def test_nothing_and_one_large_weight() -> None:
    assert not rounded(np.zeros((K, N), np.float32), 4).values.any()
    matrix = numbers(K, N)
    matrix[3, 5] = 1000
    found = rounded(matrix, 4)
    assert np.abs(found.values - matrix)[:, 6:].max() < 0.5  # other outputs do not suffer


def test_views_and_back() -> None:
    steps = (("reshape", (12, 20)), ("transpose", (1, 0)), ("reshape", (5, 48)))
    array = numbers(3, 4, 20)
    seen = viewed(array, steps)
    assert seen.shape == (5, 48)
    assert np.array_equal(seen, array.reshape(12, 20).T.reshape(5, 48))
    assert np.array_equal(unviewed(seen, steps, array.shape), array)


# ---------------------------------------------------------------------------- small graphs


class Held(nn.Module):
    """A module that holds the weights of a graph by name."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        for name, array in weights.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(array), False))


def graph(body: str, weights: dict[str, Any], inputs: str = "float[t, 80] x") -> Any:
    result = "float[a, b, c] y" if "int64" in inputs or "Unsqueeze" in body else "float[a, b] y"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({result}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(proto)


def run(model: Any, feed: dict[str, Any]) -> tuple[Any, Any]:
    """(ONNX Runtime's, the reference evaluator's)."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    running = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    from onnx.reference import ReferenceEvaluator

    return running.run(None, feed)[0], ReferenceEvaluator(proto).run(None, feed)[0]


X, IDS = {"x": numbers(3, K, seed=1)}, {"ids": np.array([[1, 7, 47], [0, 0, 2]])}
AS_IDS = "int64[b, t] ids"
# name, body, weights, feed, stored for int8 and for int4
GRAPHS: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, int], dict[str, int]]] = [
    ("product", "y = MatMul (x, w)", {"w": numbers(K, N)}, X, {"int8": 1}, {"int4": 1}),
    ("transposed", "t = Transpose (w) y = MatMul (x, t)", {"w": numbers(N, K)}, X,
     {"int8": 1}, {"int4": 1}),
    ("packed",
     ("f = Constant <value_ints = [-1, 80]> () r = Reshape <allowzero = 1> (w, f)"
      " t = Transpose <perm = [1, 0]> (r) y = MatMul (x, t)"),
     {"w": numbers(3, 16, K)}, X, {"int8": 1}, {"int4": 1}),
    ("gemm", "y = Gemm <transB = 1> (x, w, b)", {"w": numbers(N, K), "b": numbers(N)}, X,
     {"int8": 1}, {"int4": 1}),
    ("used twice", "a = MatMul (x, w) b = MatMul (x, w) y = Sub (a, b)", {"w": numbers(K, N)}, X,
     {"int8": 1}, {"int4": 1}),
    ("two layouts",
     "t = Transpose (w) a = MatMul (x, t) b = MatMul (x, w) y = Add (a, b)",
     {"w": numbers(K, K)}, X, {"int8": 1}, {"int8": 1}),
    ("stack",
     "a = Constant <value_ints = [1]> () u = Unsqueeze (x, a) y = MatMul (u, w)",
     {"w": numbers(3, K, N)}, X, {"int8": 1}, {"int8": 1}),
    ("table", "y = Gather (w, ids)", {"w": numbers(N, K)}, IDS, {"int8": 1}, {"int8": 1}),
    ("tied", "x = Gather (w, ids) t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)",
     {"w": numbers(N, K)}, IDS, {"int8": 1}, {"int8": 1}),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case[0])
def test_codes_give_what_their_values_give(case: Any, precision: str) -> None:
    name, body, weights, feed, eights, fours = case
    model = graph(body, weights, AS_IDS if feed is IDS else "float[t, 80] x")
    plain = run(model, feed)[0]
    plans, told = planned(model, precision, Held(weights))
    stored = {"int8": eights, "int4": fours}.get(precision, {precision: sum(eights.values())})
    assert told.stored == stored
    assert told.left == ({"small": 1} if "b" in weights else {})
    put_values(plans)
    expected = run(model, feed)[0]
    put_codes(model, plans)
    kinds = [v.dtype for g in model.graphs() for v in g.initializers.values() if v.name != "b"]
    assert kinds.count(ir.DataType.FLOAT) <= (eights["int8"] if precision == "int8" else 0)
    scale = max(np.abs(expected).max(), np.abs(plain).max())
    for found in run(model, feed):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * scale
    if name != "used twice":
        assert 0 < np.abs(expected - plain).max() < 0.2 * scale


def test_a_convolution_a_sum_and_what_the_exporter_made_stay() -> None:
    body = "a = Add (x, w) t = MatMul (a, m) y = MatMul (t, v)"
    held = {"w": numbers(1, 1 << 11), "v": numbers(64, 64)}
    model = graph(body, {**held, "m": numbers(1 << 11, 64)}, "float[t, 2048] x")
    _, told = planned(model, "int8", Held(held))
    assert told.left == {"made by the exporter": 1, "of Add": 1}
    assert told.stored == {"int8": 1}
    assert "1 of Add" in told.text()


def test_too_large_for_half() -> None:
    weights = {"w": numbers(K, N) * np.float32(1e5)}
    _, told = planned(graph("y = MatMul (x, w)", weights), "float16", Held(weights))
    assert told.left == {"too large for float16": 1}


def test_routers_stay_by_name_and_when_they_are_folded() -> None:
    root = nn.Module()
    root.router = Router(torch.from_numpy(numbers(32, K)), torch.zeros(32))
    root.ffn = nn.Linear(K, 32)
    weight = root.router.weight.detach().numpy()
    folded = np.ascontiguousarray(weight.T)  # as the exporter folds a transposition
    layer = np.ascontiguousarray(root.ffn.weight.detach().numpy().T)
    body = "a = MatMul (x, val_3) b = MatMul (x, val_4) y = Add (a, b)"
    _, told = planned(graph(body, {"val_3": folded, "val_4": layer}), "int4", root)
    assert (told.left, told.stored) == ({"of routers": 1}, {"int4": 1})
    body = "t = Transpose (router.weight) y = MatMul (x, t)".replace("router.weight", "r")
    model = graph(body, {"r": weight})
    model.graph.initializers["r"].name = "router.weight"
    assert planned(model, "int4", root)[1].left == {"of routers": 1}


def test_onnx_runtime_fuses_codes_and_products(tmp_path: Path) -> None:
    """It is why codes lie where they do: without it every call makes the matrix in float32."""
    for name in ("packed", "gemm"):
        _, body, weights, _, _, _ = next(case for case in GRAPHS if case[0] == name)
        for precision in ("int8", "int4"):
            model = graph(body, weights)
            put_codes(model, planned(model, precision, Held(weights))[0])
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
            proto = ir.serde.serialize_model(model).SerializeToString()
            ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
            made = [n.op_type for n in ir.load(tmp_path / "optimized.onnx").graph.all_nodes()]
            assert "DequantizeLinear" not in made
            assert made.count("MatMulNBits") == 1


def test_what_a_branch_reads_stays() -> None:
    body = (
        "s = ReduceSum <keepdims = 0> (x) z = Constant <value_float = -1000.0> ()"
        " c = Greater (s, z) y = If (c) <then_branch = a () => (float[d, e] p)"
        " { p = MatMul (x, w) }, else_branch = b () => (float[d, e] q) { q = MatMul (x, v) }>"
    )
    held = {"w": numbers(K, N), "v": numbers(K, N)}
    plans, told = planned(graph(body, held), "int8", Held(held))
    assert plans == [] and told.left == {"read in a branch": 2}


def test_uses_through_what_is_no_view() -> None:
    model = graph("t = Neg (w) y = MatMul (x, t)", {"w": numbers(K, N)})
    (use,) = uses_of(model.graph.initializers["w"])
    assert use.role is None
