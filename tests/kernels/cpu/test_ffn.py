"""The CPU kernel of routed feed-forward layers against eager, on random and odd shapes.

Tolerance in float32. A neuron is a sum of D products, an output one of all live neurons' products
and the stand-ins. Sums of n terms, in whatever order and with or without fused multiply-add, are
off by at most n * eps * the sum of magnitudes (Higham, Accuracy and Stability, 3.1); two such sums
differ by twice that. The neuron's error passes through the activation, whose slope is at most 1.13
(silu, gelu) and which is itself off by a few eps, and then through |down|. All magnitudes are
computed beside, in float64, from absolute values.
"""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from sparsify.codegen.cpu import build, tune
from sparsify.codegen.cpu.ffn import FfnKernel, Way
from sparsify.codegen.cpu.linear import quantised
from sparsify.codegen.lower import lower, lower_module
from sparsify.codegen.machine import LANES, machine
from sparsify.core import Refused
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.inputs import Magnitude
from sparsify.runtime.inside import LiveNeurons
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router
from tests.unit.runtime.examples import GELU, SILU

EPS = torch.finfo(torch.float32).eps
SLOPE = 1.2  # of the activations, at most


pytestmark = pytest.mark.usefixtures("kernels")


def layer(
    experts: int = 4,
    size: int = 12,
    width: int = 24,
    *,
    gated: bool = True,
    bias: bool = True,
    shared: int = 1,
    rule: str = "top-k",
    weights: str = "one",
    stands: bool = True,
    order: bool = False,
    active: float = 0.5,
    inside: bool = False,
    activation: Program | None = None,
) -> RoutedFFN:
    """A random layer; thresholds calibrated on random tokens."""
    rows, routed = width**-0.5, experts - shared
    draw = torch.randn
    router = Router(
        draw(routed, width) * rows,
        draw(routed) * 0.1,
        shared=shared,
        rule=rule,
        rule_options={"weights": weights} if weights != "one" else None,
        order=torch.randperm(experts) if order else None,
    )
    router.calibrate(draw(64, width))
    made = RoutedFFN(
        draw(experts, size, width) * rows,
        draw(experts, size, width) * rows if gated else None,
        draw(experts, size, width) * (experts * size) ** -0.5,
        draw(experts, size) * 0.1 if bias else None,
        draw(experts, size) * 0.1 if bias and gated else None,
        draw(width) if bias else None,
        activation=activation or (SILU if gated else GELU),
        router=router,
        dropped=draw(2, experts, width) * 0.1 if stands else None,
        slopes=draw(2, routed, width) * 0.1 if stands and not order else None,
        dropped_at=(0.25, 0.75) if stands else (),
    )
    if inside:
        part = Magnitude(torch.rand(experts * size) + 0.1, draw(experts * size) * 0.01)
        part.rule = "threshold"
        part.calibrate(draw(64, experts * size) * 0.3)
        made.host("down", LiveNeurons.within(part, None, experts))
        made.inside.set_active(0.6)  # type: ignore[union-attr]
    made.router.set_active(active, warn=False)
    return made.eval()


def always(way: Way) -> object:
    return lambda tokens, active: way


def agree(module: RoutedFFN, x: Tensor, way: Way) -> None:
    """The kernel gives what eager gives, within the derived tolerance, and counts the same."""
    kernel = FfnKernel(module, always(way))  # type: ignore[arg-type]
    found = []
    for one in (kernel, None):
        module.kernel = one
        parts = [module, *([module.inside] if module.inside is not None else [])]
        for part in parts:
            part.counter.reset()
        found.append((module(x), [copy.copy(part.counter) for part in parts]))
    (mine, counted), (eager, expected) = found
    assert counted == expected
    assert mine.shape == eager.shape and mine.dtype == eager.dtype
    error = (mine.double() - eager.double()).abs().flatten(0, -2)
    assert bool((error <= tolerance(module, x)).all()), float(error.max())


def tolerance(module: RoutedFFN, x: Tensor) -> Tensor:
    """(T, D): see the module's docstring; all experts' magnitudes, which is at least the live."""
    wide = x.reshape(-1, x.shape[-1]).double().abs()

    def summed(packed: Tensor | None, bias: Tensor | None) -> Tensor:
        if packed is None:
            return torch.ones(())
        total = wide @ packed.double().abs().flatten(0, 1).t()
        return total if bias is None else total + bias.double().abs().flatten()

    up, gate = summed(module.up, module.up_bias), summed(module.gate, module.gate_bias)
    terms = module.width + 8  # products, bias, the activation's own operations
    neuron = 2 * terms * EPS * SLOPE * up * gate * (2 if module.gate is not None else 1)
    size = (up * gate * SLOPE) + neuron
    down = module.down.double().abs().flatten(0, 1)
    outputs = module.experts * module.hidden + 2 * module.experts + 2
    most = float(module.router(x).abs().max()) if module.router.rule != "top-k" else 1.0
    scores = module.router.scores(x).double().abs().flatten(0, -2)
    sums = size @ down
    for table, factor in ((module.dropped, 1.0), (module.slopes, scores)):
        if table is not None:
            rows = table.double().abs().amax(0)
            sums = sums + (factor @ rows if isinstance(factor, Tensor) else rows.sum(0))
    if module.offset is not None:
        sums = sums + module.offset.double().abs().sum(0)
    if module.down_bias is not None:
        sums = sums + module.down_bias.double().abs()
    return max(most, 1.0) * (neuron @ down + 2 * outputs * EPS * sums) + 2 * EPS


WAYS: tuple[Way, ...] = ("few", "prefill")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rule", ["top-k", "threshold"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 19, 40])
def test_kernel_is_eager(way: Way, gated: bool, rule: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    for active in (0.3, 0.6, 1.0):
        agree(layer(gated=gated, rule=rule, active=active), torch.randn(1, tokens, 24), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("experts", "size", "width"), [(1, 1, 1), (3, 1, 7), (5, 61, 33), (2, 130, 70), (7, 9, 300)]
)
def test_sizes_that_fit_no_tile(way: Way, experts: int, size: int, width: int) -> None:
    torch.manual_seed(size)
    for tokens in (1, 17, 35):
        made = layer(experts, size, width, shared=0, active=0.7)
        agree(made, torch.randn(tokens, width), way)


def test_sizes_beyond_a_block_of_every_kind() -> None:
    """More tokens than a batch, more features than a panel or a packed row holds, more neurons
    than an item of work and a tile of outputs, more columns than a strip."""
    torch.manual_seed(0)
    agree(layer(experts=2, size=3, width=5, active=0.6), torch.randn(4500, 5), "prefill")
    for dtype in (torch.float32, torch.bfloat16):
        made = layer(experts=2, size=210, width=1100, shared=0, stands=False).to(dtype)
        x = torch.randn(150, 1100).to(dtype)
        select = (torch.rand(150, 2) < 0.9).to(dtype)
        found = FfnKernel(made).compute("prefill", made, x, select)
        assert found is not None
        wide = copy.deepcopy(made).float()
        want = wide._masked(x.float(), select.float(), None)
        rounding = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
        error = (found.double() - want.double()).abs()
        assert bool((error <= tolerance(wide, x.float()) + rounding * want.abs()).all())


def test_panels_that_just_fit() -> None:
    """80 tokens of one expert at 1,225 features: whole vectors of them are more than a panel."""
    torch.manual_seed(0)
    made = layer(experts=1, size=9, width=1225, shared=0, stands=False).to(torch.bfloat16)
    x, select = torch.randn(80, 1225).to(torch.bfloat16), torch.ones(80, 1)
    x[:, :1210] = 0  # the last features are those that would not fit
    found = FfnKernel(made).compute("prefill", made, x, select.to(torch.bfloat16))
    assert found is not None
    wide = copy.deepcopy(made).float()
    want = wide._masked(x.float(), select, None)
    bound = tolerance(wide, x.float()) + torch.finfo(torch.bfloat16).eps / 2 * want.abs()
    assert bool(((found.double() - want.double()).abs() <= bound).all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lanes", [4, 8])
def test_narrower_vectors(way: Way, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processors run: the same source with vectors of another width."""
    monkeypatch.setitem(LANES, machine().isa, lanes)
    for seed, tokens in enumerate((1, 5, 40, 70)):
        torch.manual_seed(seed)
        agree(layer(gated=seed % 2 == 0, size=33, width=70), torch.randn(tokens, 70), way)


def test_prefill_does_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    made, x = layer(size=40, width=300), torch.randn(90, 300)
    made.kernel = FfnKernel(made, always("prefill"))  # type: ignore[arg-type]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(made(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_two_threads_at_once() -> None:
    """Memory that is kept between calls belongs to one call at a time."""
    torch.manual_seed(0)
    made = [layer(size=40, width=100) for _ in range(4)]
    xs = [torch.randn(tokens, 100) for tokens in (90, 30, 70, 50)]
    expected = [one(x) for one, x in zip(made, xs, strict=True)]
    for one in made:
        one.kernel = FfnKernel(one, always("prefill"))  # type: ignore[arg-type]

    def many(at: int) -> bool:
        with torch.no_grad():
            found = [made[at](xs[at]) for _ in range(50)]
        return all(torch.allclose(y, expected[at], atol=1e-5) for y in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


@pytest.mark.parametrize("way", WAYS)
def test_every_token_on_one_expert_and_none_on_others(way: Way) -> None:
    made = layer(6, 10, 16, shared=0, active=1 / 6, stands=False)
    made.router.weight.zero_()
    made.router.bias.copy_(torch.tensor([0.0, 0, 9, 0, 0, 0]))
    x = torch.randn(33, 16)
    made.up[[0, 1, 3, 4, 5]] = torch.nan  # what is dead is not multiplied: nothing becomes NaN
    made.down[[0, 1, 3, 4, 5]] = torch.inf
    made.kernel = FfnKernel(made, always(way))  # type: ignore[arg-type]
    y = made(x)
    assert bool(y.isfinite().all())
    assert made.counter.rows == 33
    made.kernel = None
    torch.testing.assert_close(y, made(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_may_leave_nothing(way: Way) -> None:
    made = layer(4, 8, 12, shared=0, rule="threshold", active=0.5)
    made.router.bias.fill_(-1e6)
    agree(made, torch.randn(5, 12), way)


@pytest.mark.parametrize("way", WAYS)
def test_rules_that_the_kernel_does_not_know_go_through_the_router(way: Way) -> None:
    for rule, weights in (("softmax-top-k", "scaled"), ("top-p", "one"), ("relu", "one")):
        made = layer(rule=rule, weights=weights, shared=0 if weights == "scaled" else 1)
        if made.router.mix is not None:
            made.router.mix.fill_(0.5)
        agree(made, torch.randn(2, 9, 24), way)
    agree(layer(order=True), torch.randn(11, 24), way)


def test_neurons_of_live_experts() -> None:
    for tokens in (1, 5):
        for active in (0.4, 1.0):
            made = layer(inside=True, active=active)
            agree(made, torch.randn(tokens, 24), "few")
            assert made.inside is not None
            made.inside.set_active(1.0)
            agree(made, torch.randn(tokens, 24), "few")


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_are_not_contiguous(way: Way) -> None:
    x = torch.randn(24, 13).t()
    agree(layer(), x, way)
    agree(layer(), torch.randn(3, 6, 48)[:, ::2, ::2], way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(way: Way, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    agree(layer(9, 20, 40), torch.randn(21, 40), way)


@pytest.mark.parametrize("way", WAYS)
def test_ties_go_to_the_lower_expert(way: Way) -> None:
    made = layer(6, 8, 12, shared=2, active=0.5)
    made.router.weight.zero_()
    made.router.bias.zero_()
    agree(made, torch.randn(4, 12), way)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way: Way) -> None:
    # Eager rounds each intermediate to 8 bits, the kernel only the result: both are within a few
    # bfloat16 roundings of the float32 layer on the same weights.
    torch.manual_seed(1)
    made = layer(rule="top-k").to(torch.bfloat16)
    x = torch.randn(9, 24).to(torch.bfloat16)
    made.kernel = FfnKernel(made, always(way))  # type: ignore[arg-type]
    mine = made(x)
    wide = copy.deepcopy(made).float()
    wide.kernel = None
    want = wide(x.float())
    assert mine.dtype == torch.bfloat16
    rounding = float(torch.finfo(torch.bfloat16).eps) / 2
    torch.testing.assert_close(mine.float(), want, rtol=2 * rounding, atol=2e-3)


@pytest.mark.parametrize("way", WAYS)
def test_int8_is_the_layer_of_rounded_weights(way: Way) -> None:
    torch.manual_seed(2)
    made = layer(5, 20, 48)
    x = torch.randn(9, 48)
    made.kernel = FfnKernel(made, always(way), int8=True)  # type: ignore[arg-type]
    mine = made(x)
    twin = copy.deepcopy(made)
    twin.kernel = None
    for weight in (twin.up, twin.gate, twin.down):
        assert weight is not None
        numbers, scale = quantised(weight.flatten(0, 1))
        weight.copy_((numbers.float() * scale[:, None]).view_as(weight))
    torch.testing.assert_close(mine, twin(x), rtol=1e-4, atol=1e-5)


def test_activations_written_out() -> None:
    """tanh and exp are ours; they hold over the whole range."""
    steps = (Step("t", "aten.tanh.default", (Ref("up"),)),)
    program = Program(("up",), steps, "t")
    made = layer(1, 8, 8, gated=False, bias=False, shared=0, stands=False, activation=program)
    for scale in (1e-3, 1.0, 30.0, 1e4):
        agree(made, torch.randn(16, 8) * scale, "few")
    made = layer(1, 8, 8, shared=0, stands=False, bias=False)
    for scale in (100.0, 1e4):
        agree(made, torch.randn(16, 8) * scale, "prefill")


def test_nan_and_infinity_come_through() -> None:
    made = layer(2, 8, 8, shared=0, active=1.0, stands=False)
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    for way in WAYS:
        made.kernel = FfnKernel(made, always(way))  # type: ignore[arg-type]
        y = made(x)
        assert bool(y[1].isnan().all())
        assert bool(y[[0, 2]].isfinite().all())


def test_weights_that_moved_are_read_where_they_are() -> None:
    made = layer()
    x = torch.randn(2, 24)
    made.kernel = FfnKernel(made, always("few"))  # type: ignore[arg-type]
    made(x)
    made.up = nn.Parameter(made.up * 2)
    made.router.bias.add_(0.5)
    agree_after = made(x)
    made.kernel = None
    torch.testing.assert_close(agree_after, made(x), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(made)
    twin.kernel = FfnKernel(twin, always("few"))  # type: ignore[arg-type]
    again = copy.deepcopy(twin)
    again.up.mul_(3)
    assert not torch.allclose(again(x), twin(x))


def test_the_budget_may_be_turned() -> None:
    made = layer(8, 6, 24, rule="threshold")
    for active in (0.9, 0.3, 0.6):
        made.router.set_active(active)
        agree(made, torch.randn(5, 24), "few")


def test_a_turn_of_the_dial_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(experts=8, size=4, width=16, rule="threshold")
    kernel = FfnKernel(module, choose=always("few"))
    reads: list[int] = []
    read = kernel._read
    monkeypatch.setattr(kernel, "_read", lambda *given: reads.append(1) or read(*given))
    for active in (0.5, 0.25, 1.0):
        module.router.set_active(active)
        reads.clear()
        for _ in range(3):  # the threshold is computed in the first, which changed what is compared
            assert kernel(module, torch.randn(1, 16)) is not None
        assert reads == [1], active


def test_training_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    made = layer().requires_grad_()
    lower_module(made)
    with torch.enable_grad():
        y = made(torch.randn(4, 24, requires_grad=True))
        y.sum().backward()
    assert made.up.grad is not None


def test_lowering_says_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    steps = (Step("c", "aten.cumsum.default", (Ref("up"), -1)),)
    odd = layer(gated=False, activation=Program(("up",), steps, "c"))
    model = nn.ModuleDict({"good": layer(), "odd": odd, "twin": layer()})
    remarks = {r.region: r for r in lower(model)}
    assert [remarks[p].kind for p in ("good", "twin", "odd")] == ["applied", "applied", "left"]
    assert "cumsum" in remarks["odd"].reason
    assert "at 50% active" in remarks["good"].reason
    assert odd.kernel is None


def test_without_a_compiler_eager_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise build.NoCompiler("there is no C compiler", help="apt-get install gcc")

    monkeypatch.setattr("sparsify.codegen.cpu.ffn.load", missing)
    made = layer()
    remark = lower_module(made)
    assert (remark.kind, remark.suggestion) == ("left", "apt-get install gcc")
    assert made(torch.randn(2, 24)).shape == (2, 24)


def test_float64_is_refused() -> None:
    with pytest.raises(Refused, match="float64"):
        FfnKernel(layer().double(), always("few"))  # type: ignore[arg-type]


def test_the_table_decides() -> None:
    table: tune.Table = {
        "few": {1: (1.0, 4.0), 4: (2.0, 16.0)},
        "prefill": {4: (3.0, 6.0), 16: (4.0, 20.0)},
        "dense": {1: (5.0, 5.0), 4: (6.0, 6.0), 16: (7.0, 7.0)},
    }
    assert tune.best(table, 1, 0.25) == "few"
    assert tune.best(table, 16, 0.25) == "prefill"
    assert tune.best(table, 16, 1.0) == "dense"
    assert tune.seconds(table, "few", 2, 0.25) == pytest.approx(2**0.5)
    assert tune.chooser(table)(16, 1.0) == "dense"


def test_where_dense_is_faster_it_runs() -> None:
    made = layer(rule="threshold")
    x = torch.randn(6, 24)
    made.kernel = FfnKernel(made, always("dense"))  # type: ignore[arg-type]
    y = made(x)
    assert made.counter.rows == 6 * made.experts  # nothing was skipped, and it says so
    made.kernel = None
    torch.testing.assert_close(y, made(x), rtol=1e-4, atol=1e-5)


def test_500_random_shapes() -> None:
    draw = random.Random(0)
    for seed in range(500):
        torch.manual_seed(seed)
        experts, shared = draw.randint(1, 9), draw.randint(0, 1)
        shared = min(shared, experts - 1)
        made = layer(
            experts, draw.randint(1, 70), draw.randint(1, 90), gated=draw.random() < 0.6,
            bias=draw.random() < 0.5, shared=shared, rule=draw.choice(["top-k", "threshold"]),
            stands=draw.random() < 0.5, active=draw.uniform(0.2, 1.0),
        )  # fmt: skip
        x = torch.randn(draw.choice([1, 2, 5, 16, 17, 50]), made.width)
        agree(made, x, draw.choice(WAYS))
