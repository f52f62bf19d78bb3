"""CPU kernels of routed projections against eager, on random and odd shapes.

Tolerance in float32: a sum of n products in any order and with or without fused multiply-add is off
by at most n * eps * sum |products| (Higham, Accuracy and Stability, 3.1: gamma_n); two such sums
differ by twice that. The sum of magnitudes is computed beside them in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify.codegen.cpu import build, call
from sparsify.codegen.cpu.linear import LinearKernel, quantised
from sparsify.codegen.cpu.lower import kernel_of
from sparsify.codegen.machine import machine
from sparsify.core import Refused
from sparsify.runtime.beside import together
from sparsify.runtime.heads import RoutedColumns, RoutedRows
from sparsify.runtime.hidden import HiddenColumns, unmixed
from sparsify.runtime.inputs import Magnitude, RoutedLinear
from sparsify.runtime.spec import RoutedModule

EPS = torch.finfo(torch.float32).eps


pytestmark = pytest.mark.usefixtures("kernels")


def projection(
    inputs: int,
    outputs: int,
    *,
    rule: str = "threshold",
    centre: bool = True,
    bias: bool = True,
    active: float = 0.5,
) -> RoutedLinear:
    scale = torch.rand(inputs) + 0.1
    select = Magnitude(scale, torch.randn(inputs) if centre else None, rule=rule)
    select.calibrate(select.centred(torch.randn(64, inputs)))
    weight = torch.randn(outputs, inputs)
    made = RoutedLinear.from_dense(weight, torch.randn(outputs) if bias else None, select)
    made.select.set_active(active)
    return made


def both(module: RoutedModule, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(kernel's, eager's), with equal counters; the kernel must not decline."""
    found = []
    for kernel in (kernel_of(module), None):
        module.kernel = kernel
        module.counter.reset()
        found.append((module(*inputs), copy.copy(module.counter)))
        if kernel is not None:
            assert kernel(module, *inputs) is not None
    module.kernel = None
    (mine, counted), (eager, expected) = found
    assert counted == expected
    assert mine.shape == eager.shape and mine.dtype == eager.dtype
    return mine, eager


def agree(mine: Tensor, eager: Tensor, magnitude: Tensor, terms: int) -> None:
    """Within what the order of summation and fused operations can do."""
    bound = 2 * (terms + 3) * EPS * magnitude
    worst = ((mine.double() - eager.double()).abs() - bound).max()
    assert worst <= 0, f"off by {worst} more than derived"


def magnitude(module: RoutedLinear, x: Tensor) -> Tensor:
    """Sum of |terms| of every output: all features, offset and bias."""
    centred = module.select.centred(x).double().abs()
    total = centred @ module.columns.double().abs()
    for extra in (module.offset, module.bias):
        total = total if extra is None else total + extra.double().abs()
    return total


def check_linear(rng: random.Random) -> None:
    inputs, outputs = rng.choice([1, 3, 7, 8, 33, 130]), rng.choice([1, 5, 8, 17, 64, 200, 1030])
    module = projection(
        inputs,
        outputs,
        rule=rng.choice(["threshold", "top-k"]),
        centre=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        active=rng.choice([0.05, 0.25, 0.5, 0.75, 1.0]),
    )
    lead = rng.choice([(), (1,), (1, 1), (2,), (8,), (2, 3), (5, 1)])
    x = torch.randn(*lead, inputs)
    if rng.random() < 0.3:  # not contiguous
        x = torch.randn(*lead, 2 * inputs)[..., ::2]
    if rng.random() < 0.2:  # nothing above the threshold
        x = x * 0 if module.select.centre is None else module.select.centre.expand_as(x)
    torch.set_num_threads(rng.choice([1, 2]))
    mine, eager = both(module, x)
    agree(mine, eager, magnitude(module, x), inputs)


def routed_columns(rng: random.Random, units: int, size: int, outputs: int) -> RoutedColumns:
    order = torch.randperm(units * size)
    if rng.random() < 0.5:
        order = torch.arange(units * size)
    return RoutedColumns.from_dense(
        torch.randn(outputs, units * size),
        torch.randn(outputs) if rng.random() < 0.5 else None,
        order.view(units, size),
        torch.randn(units, outputs) if rng.random() < 0.5 else None,
    )


def selection(rng: random.Random, lead: tuple[int, ...], units: int, weights: bool) -> Tensor:
    share = rng.choice([0.0, 0.3, 0.6, 1.0])
    live = (torch.rand(*lead, units) < share).float()
    return live * (torch.rand(*lead, units) + 0.5) if weights else live


def check_columns(rng: random.Random) -> None:
    units, size = rng.choice([1, 2, 5, 9]), rng.choice([1, 3, 8, 20])
    outputs = rng.choice([1, 8, 17, 64, 1030])
    module = routed_columns(rng, units, size, outputs)
    lead = rng.choice([(1,), (1, 1), (3,), (8,), (2, 4)])
    z, select = torch.randn(*lead, units * size), selection(rng, lead, units, True)
    torch.set_num_threads(rng.choice([1, 2]))
    mine, eager = both(module, z, select)
    weight = module.dense_weights()["weight"].double().abs()
    total = 1.5 * z.double().abs() @ weight.t()
    for extra in (module.bias, module.dropped):
        total = total if extra is None else total + extra.double().abs().sum(0).expand_as(total)
    agree(mine, eager, total, units * size + units)


def check_rows(rng: random.Random) -> None:
    units, size, others = rng.choice([1, 2, 5]), rng.choice([1, 3, 8, 21]), rng.choice([0, 1, 6])
    inputs, out = rng.choice([1, 7, 16, 33, 130]), units * size + others
    order = torch.randperm(out) if rng.random() < 0.5 else torch.arange(out)
    module = RoutedRows.from_dense(
        torch.randn(out, inputs),
        torch.randn(out) if rng.random() < 0.5 else None,
        order[: units * size].view(units, size),
        order[units * size :],
    )
    lead = rng.choice([(1,), (1, 1), (3,), (8,), (2, 4)])
    x, select = torch.randn(*lead, inputs), selection(rng, lead, units, False)
    torch.set_num_threads(rng.choice([1, 2]))
    mine, eager = both(module, x, select)
    assert torch.equal(mine == 0, eager == 0)  # rows of dead units are exactly zero
    total = x.double().abs() @ module.dense_weights()["weight"].double().abs().t()
    for bias in (module.bias, module.other_bias):
        total = total if bias is None else total + bias.double().abs().max()
    agree(mine, eager, total, inputs)


CHECKS = pytest.mark.parametrize("check", [check_linear, check_columns, check_rows])


@CHECKS
def test_random_shapes(check: Callable[[random.Random], None]) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        check(random.Random(seed))


@pytest.mark.parametrize("isa", ["generic", "avx512"])
@CHECKS
def test_other_vector_widths(
    check: Callable[[random.Random], None], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gcc takes vectors apart that the processor does not have."""
    other = dataclasses.replace(machine(), isa=isa)
    assert other.lanes != machine().lanes or machine().isa == isa
    monkeypatch.setattr(call, "machine", lambda: other)
    for seed in range(8):
        torch.manual_seed(seed)
        check(random.Random(seed))


@pytest.mark.slow
@CHECKS
def test_500_random_shapes(check: Callable[[random.Random], None]) -> None:
    for seed in range(1000, 1500):
        torch.manual_seed(seed)
        check(random.Random(seed))


def test_dead_rows_are_not_read() -> None:
    module = projection(40, 24, rule="top-k", centre=False)
    x = torch.randn(1, 40)
    for tokens in (1, 4):
        mine, _ = both(module, x.expand(tokens, -1))
        dead = ~module.select.live(module.select.scores(x))[0]
        broken = copy.deepcopy(module)
        broken.columns[dead] = float("nan")
        broken.kernel = kernel_of(broken)
        assert torch.equal(broken(x.expand(tokens, -1)), mine)
    # each token reads its own rows: NaN for one token's rows leaves the other's output whole
    pair = torch.randn(2, 40)
    live = module.select.live(module.select.scores(pair))
    broken = copy.deepcopy(module)
    broken.columns[live[0] & ~live[1]] = float("nan")
    broken.kernel = kernel_of(broken)
    y = broken(pair)
    assert y[0].isnan().all() and not y[1].isnan().any()
    for made in (
        RoutedColumns(torch.randn(4, 3, 10), dropped=torch.randn(4, 10)),
        RoutedRows(torch.randn(4, 3, 12)),
    ):
        select = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
        mine, _ = both(made, x[:, :12], select)
        made.blocks[0] = made.blocks[2] = float("nan")
        made.kernel = kernel_of(made)
        assert torch.equal(made(x[:, :12], select), mine)


def test_ties_go_to_the_lower_input() -> None:
    for keep in (1, 3, 7, 12):
        module = projection(16, 9, rule="top-k", centre=False, active=keep / 16)
        module.select.scale.fill_(1.0)
        x = torch.tensor([1.0, -1.0, 0.0, -0.0] * 4).view(1, 16)
        mine, eager = both(module, x)
        agree(mine, eager, magnitude(module, x), 16)
    x[0, 5] = float("nan")  # sorts first, as in torch
    mine, eager = both(module, x)
    assert mine.isnan().all() and eager.isnan().all()


def test_bfloat16() -> None:
    """The same selection; sums are kept in float32 and rounded once, which eager does per step."""
    for rule in ("threshold", "top-k"):
        for tokens in (1, 5):
            module = projection(130, 200, rule=rule)
            module = module.to(torch.bfloat16)
            x = torch.randn(tokens, 130).to(torch.bfloat16)
            mine = kernel_of(module)(module, x)
            counted = module.counter.units_live
            module.counter.reset()
            module(x)
            assert module.counter.units_live == counted
            live = module.select.live(module.select.scores(module.select.centred(x)))
            exact = (module.select.centred(x).double() * live) @ module.columns.double()
            assert module.offset is not None and module.bias is not None
            exact = exact + module.offset.double() + module.bias.double()
            bound = exact.abs() * 2**-8 + magnitude(module, x.float()) * 134 * EPS
            assert mine.dtype == torch.bfloat16
            assert ((mine.double() - exact).abs() <= bound).all()
    rows = RoutedRows(torch.randn(3, 5, 40)).to(torch.bfloat16)
    columns = RoutedColumns(torch.randn(3, 5, 40)).to(torch.bfloat16)
    select = torch.tensor([[1.0, 0, 1.0]]).to(torch.bfloat16)
    for made, width in ((rows, 40), (columns, 15)):
        mine, eager = both(made, torch.randn(1, width).to(torch.bfloat16), select)
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights(dtype: torch.dtype) -> None:
    module = projection(64, 72).to(dtype)
    kernel = LinearKernel(module, int8=True)
    x = torch.randn(1, 64).to(dtype)
    for _ in range(2):
        q, scale = quantised(module.columns)
        again = copy.deepcopy(module).float()
        again.columns.copy_(q.float() * scale[:, None])
        assert ((again.columns - module.columns.float()).abs() <= 0.501 * scale[:, None]).all()
        mine, exact = kernel(module, x), again(x.float())
        assert mine is not None and mine.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine.float(), exact, rtol=tolerance, atol=60 * tolerance)
        module.columns.mul_(2.0)  # in place: packed anew


def test_what_is_refused_and_declined() -> None:
    module = projection(16, 8)
    kernel = kernel_of(module)
    assert kernel(module, torch.randn(9, 16)) is None
    assert kernel(module, torch.randn(0, 16)) is None
    assert kernel(module, torch.randn(1, 16).double()) is None
    assert kernel(module, torch.randn(1, 16, device="meta")) is None
    module.select.live = module.select.live  # type: ignore[method-assign]  # as training does
    assert kernel(module, torch.randn(1, 16)) is None
    with pytest.raises(Refused, match="float64"):
        kernel_of(projection(16, 8).double())
    with pytest.raises(Refused, match="not top-p"):
        kernel_of(RoutedLinear(torch.randn(4, 4), None, Magnitude(torch.ones(4), rule="top-p")))
    with pytest.raises(Refused, match="no CPU kernel for Magnitude"):
        kernel_of(module.select)
    rows = RoutedRows(torch.randn(3, 5, 40))
    assert kernel_of(rows)(rows, torch.randn(2, 40), torch.ones(1, 3)) is None
    assert kernel_of(rows)(rows, torch.randn(1, 40), torch.ones(1, 3).bool()) is None


def test_weights_that_move_or_change() -> None:
    module = projection(32, 16)
    module.kernel = kernel_of(module)
    x = torch.randn(1, 32)
    for change in (
        lambda: module.columns.mul_(2.0),
        lambda: setattr(module, "columns", torch.nn.Parameter(torch.randn(32, 16))),
        lambda: setattr(module, "bias", None),
        lambda: module.select.set_active(0.25),
        lambda: module.select.set_active(1.0),
        lambda: module.load_state_dict(projection(32, 16).state_dict(), strict=False),
        lambda: module.columns.set_(torch.randn(16, 32).t()),  # not contiguous: eager
    ):
        change()
        mine = module(x)
        kernel, module.kernel = module.kernel, None
        torch.testing.assert_close(mine, module(x), rtol=1e-5, atol=1e-4)
        module.kernel = kernel


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("rule", ["threshold", "top-k"])
def test_together_is_one_by_one(rule: str, tokens: int) -> None:
    """Wide enough for several threads; outputs of one projection are no multiple of a vector."""
    sizes = ((300, 0.5), (33, 0.25), (512, 1.0), (7, 0.75))
    modules = [projection(200, out, rule=rule, active=active) for out, active in sizes]
    modules[1].bias = None
    x = torch.randn(1, tokens, 200)
    for module in modules:
        module.kernel = kernel_of(module)
    alone = [module(x) for module in modules]
    counted = [copy.copy(module.counter) for module in modules]
    for module in modules:
        module.counter.reset()
    found = together(modules, x)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert [module.counter for module in modules] == counted


def test_what_cannot_go_together_goes_alone() -> None:
    first, second, third = (projection(24, 10) for _ in range(3))
    x = torch.randn(1, 24)
    expected = [module(x) for module in (first, second, third)]
    joint = first.kernel = kernel_of(first)
    second.kernel, third.kernel = kernel_of(second), kernel_of(third)
    assert joint.together((first, second, third), x) is not None
    third.dispatch = "grouped"  # no kernel runs it
    found = together((first, second, third), x)
    third.dispatch, third.kernel = "auto", None
    assert joint.together((first, third), x) is None
    third.kernel = kernel_of(third, int8=True)
    assert joint.together((first, third), x) is None
    third.kernel = kernel_of(third)
    third.kernel.cuts = (math.inf, *(0.1,) * 8)  # dense is faster
    assert joint.together((first, third), x) is None
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager)


def test_a_turn_of_the_dial_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds are looked up one after the other in the first round: that is no change."""
    modules = [projection(24, 10) for _ in range(3)]
    made: list[int] = []
    for module in modules:
        module.kernel = kernel = kernel_of(module)
        grouped = kernel._grouped
        monkeypatch.setattr(
            kernel, "_grouped", lambda *given, own=grouped: made.append(1) or own(*given)
        )
    for active in (0.5, 0.25, 1.0):
        for module in modules:
            module.select.set_active(active)
        made.clear()
        for _ in range(3):
            for module in modules:
                module(torch.randn(1, 24))
        assert len(made) == len(modules), active


def test_one_tensor_of_a_module_may_be_replaced() -> None:
    module = projection(24, 10)
    x = torch.randn(1, 24)
    both(module, x)
    module.kernel = kernel_of(module)
    changes = {
        "columns": lambda: setattr(module.columns, "data", torch.randn(24, 10)),
        "offset": lambda: setattr(module.offset, "data", torch.randn(10)),
        "bias": lambda: setattr(module.bias, "data", torch.randn(10)),
        "centre": lambda: setattr(module.select, "centre", torch.randn(24)),
        "scale": lambda: setattr(module.select, "scale", torch.rand(24)),
        "dial": lambda: module.select.set_active(0.25),
    }
    for what, change in changes.items():
        module(x)
        change()
        mine, module.dispatch = module(x), "grouped"
        torch.testing.assert_close(mine, module(x), msg=what)
        module.dispatch = "auto"


def test_copies_and_files() -> None:
    """A copy gets a kernel of its own, a pickle none: nothing keeps pointers to other weights."""
    x = torch.randn(1, 32)
    for module, inputs in (
        (projection(32, 16), (x,)),
        (RoutedColumns(torch.randn(4, 8, 16)), (x, torch.ones(1, 4))),
        (RoutedRows(torch.randn(4, 8, 32)), (x, torch.ones(1, 4))),
    ):
        module.kernel = kernel_of(module)
        before = module(*inputs)
        twin = copy.deepcopy(module)
        for p in module.parameters():
            p.zero_()
        assert twin.kernel is not None and twin.kernel is not module.kernel
        assert torch.equal(twin(*inputs), before)
        file = io.BytesIO()
        torch.save(twin, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert again.kernel is None
        torch.testing.assert_close(again(*inputs), before, rtol=1e-5, atol=1e-4)


def test_inference_mode() -> None:
    with torch.inference_mode():
        module = projection(32, 16).to(torch.bfloat16)
        for int8 in (False, True):
            assert (
                LinearKernel(module, int8=int8)(module, torch.randn(1, 32).bfloat16()) is not None
            )


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    module = projection(32, 16)
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(build.NoCompiler, match="run eagerly"):
        kernel_of(module)
    assert module(torch.randn(1, 32)).shape == (1, 16)


def test_training_and_grouped_run_eagerly() -> None:
    module = projection(32, 16)
    calls = []
    module.kernel = lambda *_: calls.append(1)
    x = torch.randn(1, 32)
    module(x)
    assert len(calls) == 1
    module.dispatch = "grouped"
    module(x)
    module.dispatch = "auto"
    with torch.enable_grad():
        module(x.requires_grad_())
    assert len(calls) == 1


def test_mixing_comes_after_the_kernel() -> None:
    module = HiddenColumns(torch.randn(4, 3, 12))
    mixing = unmixed(4, 3, torch.ones(1)) + 0.1
    module.mix(mixing)
    select = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    mine, eager = both(module, torch.randn(1, 12), select)
    torch.testing.assert_close(mine, eager)


def test_threads_share_a_kernel() -> None:
    """Many callers at once: each gets its own result."""
    module = projection(64, 512)
    module.kernel = kernel_of(module)
    xs = [torch.randn(1, 64) for _ in range(8)]
    expected = [module(x) for x in xs]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(module(xs[i]), expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_results_do_not_depend_on_threads() -> None:
    module = projection(300, 700)
    module.kernel = kernel_of(module)
    x = torch.randn(3, 300)
    torch.set_num_threads(1)
    one = module(x)
    torch.set_num_threads(2)
    assert torch.equal(module(x), one)
