"""The ways to write a routed feed-forward layer: all give what eager gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.codegen.onnx import chain, form_ffn, moe, parity, timing, translate, write
from sparsify.codegen.onnx.forms import into_forms
from sparsify.codegen.onnx.trace import silenced
from sparsify.runtime.calling import ModuleCall, Slot
from sparsify.runtime.compressed import CompressedFFN
from sparsify.runtime.conditioned import ConditionedFFN
from sparsify.runtime.few_bits import FewBitsFFN
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router
from tests.unit.onnx.models import needs_compiler
from tests.unit.runtime.examples import GELU, SILU

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
EXPERTS, SIZE, WIDTH = 6, 5, 12
UNKNOWN = Program(("up",), (Step("h", "aten.lgamma.default", (Ref("up"),)),), "h")
RELU = Program(("up",), (Step("h", "aten.relu.default", (Ref("up"),)),), "h")
WAYS = ("mask", "branch", "moe", "custom")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / 2


def layer(
    rule: str = "threshold",
    *,
    shared: int = 1,
    weights: str = "one",
    bias: bool = False,
    dropped: bool = False,
    order: bool = False,
    activation: Program = SILU,
    active: float = 0.5,
    kind: type[RoutedFFN] = RoutedFFN,
    **options: Any,
) -> RoutedFFN:
    """Six experts, half of them live."""
    torch.manual_seed(3)
    scored = EXPERTS - shared
    router = Router(
        draw(scored, WIDTH) * 3, draw(scored), shared=shared, rule=rule,
        order=torch.randperm(EXPERTS) if order else None, rule_options={"weights": weights},
    )  # fmt: skip
    router.calibrate(draw(64, WIDTH))
    gated = len(activation.inputs) == 2
    up, gate, down = (draw(EXPERTS, SIZE, WIDTH) for _ in range(3))
    ups = draw(EXPERTS, SIZE) if bias else None
    gates = draw(EXPERTS, SIZE) if bias and gated else None
    ffn = kind(
        up, gate if gated else None, down, ups, gates, draw(WIDTH) if bias else None,
        activation=activation, router=router, **options,
    )  # fmt: skip
    if dropped:
        ffn.add_stand_ins(active, draw(EXPERTS, WIDTH), draw(scored, WIDTH))
    router.set_active(active)
    return ffn


def layers() -> dict[str, RoutedFFN]:
    """What a form has to keep."""
    return {
        "threshold": layer(),
        "counted, nothing shared": layer("top-k", shared=0),
        "biases": layer(bias=True),
        "stand-ins": layer(bias=True, dropped=True),
        "weights": layer("softmax-top-k", shared=0, weights="paper"),
        "weights of shared experts": layer("moh", shared=2, weights="paper"),
        "any number live, none too": layer("relu", shared=0, weights="paper", active=0.2),
        "units in another order": layer(order=True, shared=2, bias=True),
        "relu": layer(activation=RELU, bias=True),
        "exact gelu": layer(activation=GELU),
        "modulated": layer(kind=CompressedFFN, vectors=draw(5, WIDTH)),
        "nearly nothing live": layer(shared=0, active=0.01),
    }


@pytest.mark.parametrize("way", WAYS)
def test_forms_in_torch(way: str) -> None:
    found, eager = nn.ModuleDict(layers()), nn.ModuleDict(layers())
    into_forms(found, way)
    for name, ffn in eager.items():
        for shape in ((2, 4, WIDTH), (1, 1, WIDTH)):
            x = draw(*shape) * 2
            with torch.no_grad():
                expected, got = ffn(x), found[name](x)
            assert float((expected - got).abs().max()) <= 2e-5, name


def test_what_each_layer_becomes() -> None:
    assert {form_ffn.ways(ffn, "custom") for ffn in layers().values()} == {"custom"}
    assert form_ffn.ways(layer(activation=UNKNOWN), "custom") == "branch"
    assert form_ffn.ways(FewBitsFFN.of(layer(), [8] * EXPERTS, 4), "custom") == "mask"
    found = {name: form_ffn.ways(ffn, "moe") for name, ffn in layers().items()}
    assert found.pop("exact gelu") == "branch"  # the kernel's is the tanh approximation
    assert set(found.values()) == {"moe"}
    ffn = layer()
    assert form_ffn.ways(FewBitsFFN.of(ffn, [8] * EXPERTS, 4), "moe") == "mask"
    ffn.router.set_active(1.0)
    assert form_ffn.ways(ffn, "moe") == "dense"
    assert form_ffn.ways(layer(shared=EXPERTS - 1, active=0.1), "branch") == "branch"


def test_weights_that_may_be_below_zero_are_no_shares() -> None:
    ffn = layer("softmax-top-k", shared=0, weights="scaled")
    assert form_ffn.ways(ffn, "moe") == "moe"
    assert ffn.router.mix is not None
    ffn.router.mix.data.fill_(1.5)
    assert form_ffn.ways(ffn, "moe") == "branch"


def test_activations_are_known_by_what_they_compute() -> None:
    steps = (
        Step("s", "aten.sigmoid.default", (Ref("b"),)),
        Step("g", "aten.mul.Tensor", (Ref("b"), Ref("s"))),
        Step("h", "aten.mul.Tensor", (Ref("a"), Ref("g"))),
    )
    assert moe.activation_of(Program(("a", "b"), steps, "h")) == "swiglu"
    assert moe.activation_of(RELU) == "relu"
    tanh = Program(("x",), (Step("h", "aten.gelu.default", (Ref("x"),), {"approximate": "tanh"}),), "h")  # fmt: skip  # noqa: E501
    assert moe.activation_of(tanh) == "gelu"
    assert moe.activation_of(Program.identity()) == "identity"
    assert moe.activation_of(GELU) is None
    other = (Step("s", "aten.sigmoid.default", (Ref("b"),)), Step("h", "aten.mul.Tensor", (Ref("a"), Ref("s"))))  # fmt: skip  # noqa: E501
    assert moe.activation_of(Program(("a", "b"), other, "h")) is None


def test_shares_are_weights_and_nothing_else_is_computed() -> None:
    """The kernel computes what has a share above zero."""
    weights = torch.tensor([[0.0, 0.25, 3.0, 1e-6], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    shares = moe.logits_of(weights, weigh=True).softmax(-1)
    live = weights.any(-1)
    assert torch.allclose(shares[live] * weights[live].sum(-1, keepdim=True), weights[live])
    assert torch.equal(shares[live] > 0, weights[live] > 0)
    assert (shares[1] > 0).sum() == 1
    many = (torch.rand(50, 64) < 0.1).float()
    many[:, 5], many[0] = 1, 0
    shares = moe.logits_of(many, weigh=False).softmax(-1)
    assert torch.equal(shares[1:] > 0, many[1:] > 0) and (shares[0] > 0).sum() == 1


# ---------------------------------------------------------------------------- in ONNX Runtime

WRITTEN = (
    "stand-ins", "weights of shared experts", "any number live, none too",
    "units in another order", "modulated", "nearly nothing live", "relu",
)  # fmt: skip


class All(nn.Module):
    """Several layers on one input, and one that a condition routes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: layers()[name] for name in WRITTEN})
        self.conditioned = layer("top-k", kind=ConditionedFFN)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        return (*(ffn(x) for ffn in self.layers.values()), self.conditioned(x, condition))


@pytest.fixture(scope="module", params=["branch", "moe", "custom"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "custom":
        needs_compiler()
    formed, free = All().eval(), torch.export.Dim.AUTO
    into_forms(formed, request.param)
    example = draw(2, 3, WIDTH), draw(2, WIDTH)
    with torch.no_grad(), silenced():
        program = torch.export.export(
            formed, example, dynamic_shapes=({0: free, 1: free}, {0: free}), strict=False
        )
    slots = (Slot("x", (None, None, WIDTH)), Slot("condition", (None, WIDTH)))
    outputs = [{"kind": "tensor"}] * (len(formed.layers) + 1)
    tree = {"kind": "tuple", "items": outputs}
    call = ModuleCall(slots, ("x", "condition"), {}, tree)
    model = translate.translated(program, call, 20, "ort-custom")
    path = tmp_path_factory.mktemp(request.param) / "all.onnx"
    write.write(model, path, external=None, force=False)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_files_compute_what_eager_computes(exported: Path, threads: int) -> None:
    eager, running = All().eval(), parity.session(exported, threads=threads)
    for batch, tokens in ((1, 1), (2, 3), (3, 40)):
        flat = [draw(batch, tokens, WIDTH) * 2, draw(batch, WIDTH) * 2]
        with torch.no_grad():
            expected = eager(*flat)
        found = parity.run(running, ("x", "condition"), flat)
        names = [*eager.layers, "conditioned"]
        for name, a, b in zip(names, expected, found, strict=True):
            assert float((a - b).abs().max()) <= 1e-4 * float(a.abs().max()), name


def test_nothing_live_gives_what_is_left(exported: Path) -> None:
    """The layers that a token may leave without any expert."""
    eager, running = All().eval(), parity.session(exported)
    x = draw(1, 30, WIDTH)
    with torch.no_grad():
        live = {n: (f.router(x) != 0).any(-1) for n, f in eager.layers.items()}
        expected = eager(x, draw(1, WIDTH))
    found = parity.run(running, ("x", "condition"), [x, draw(1, WIDTH)])
    empty = [n for n, any_live in live.items() if not bool(any_live.all())]
    assert "nearly nothing live" in empty
    for name in empty:
        at = list(live).index(name)
        assert float((found[at] - expected[at]).abs().max()) <= 1e-5


def test_the_given_selection_is_what_is_timed() -> None:
    """The timed layer computes its own selection, and uses the one that it is told."""
    ffn = layer("top-k", shared=2, bias=True)
    timed, generator = chain.alone(ffn, "branch"), torch.Generator().manual_seed(1)
    x, given = draw(1, 4, WIDTH), timing.selection(ffn, 4, 4, generator)
    assert given.sum(-1).tolist() == [[4.0] * 4] and bool((given[..., :2] == 1).all())
    with torch.no_grad():
        neurons = ffn.neurons(x) * given.repeat_interleave(SIZE, -1)
        expected = neurons @ ffn.down.flatten(0, 1) + ffn.down_bias
        assert float((timed(x, given) - expected).abs().max()) <= 1e-5
    assert type(ffn) is RoutedFFN and ffn.router.active == 0.5
    dense = chain.alone(ffn, "dense")
    assert dense.ffn.router.active == 1.0 and ffn.router.active == 0.5
    assert dense.ffn.up.data_ptr() == ffn.up.data_ptr()
