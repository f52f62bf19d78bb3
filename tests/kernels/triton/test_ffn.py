"""The routed feed-forward operator, in Triton's interpreter, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sparsify.codegen.triton.activation import functions, key_of
from sparsify.codegen.triton.ffn_kernel import lower_ffn
from sparsify.codegen.triton.ffn_ops import routed_ffn
from sparsify.codegen.triton.pairs import BLOCK, sort_pairs
from sparsify.core import Refused
from sparsify.runtime.program import Program, Ref, Step
from tests.kernels.activations import further_programs
from tests.kernels.triton.ffn_cases import NAMES, Case, bounds
from tests.unit.runtime.examples import SILU, Dense

SMALL = 12  # seeds: every activation of even ones with gradients


@pytest.mark.parametrize("seed", range(SMALL))
def test_forward_and_gradients(seed: int) -> None:
    Case.draw(seed, 40).check(gradients=seed % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_random_shapes(seed: int) -> None:
    for i in range(5):
        Case.draw(1000 + 5 * seed + i, 150).check()


def test_what_dead_pairs_cannot_bound_bounds_nothing_else() -> None:
    """1 / x ** 3 of a sum that float32 may have as zero: any value, but its expert is dead."""
    near = torch.tensor([[1.0, 2.0**-20 - 1]])
    up = torch.stack([torch.ones(1, 2), torch.tensor([[1.0, -1.0]])])  # 2 ** -20, and about 2
    down = torch.ones(2, 1, 2)
    for select, known in (([0.0, 1.0], True), ([1.0, 1.0], False)):
        tensors = (near, torch.tensor([select]), up, None, down, None, None, None)
        case = Case(tensors, further_programs()["cube"], 2, str(select))
        found = bounds(tensors, case.activation, torch.ones(1, 2))
        for name in ("y", "x", "down"):
            assert found[name][1].isfinite().all() == known, name
            assert not found[name][1].isnan().any(), name
        case.check()


@pytest.mark.parametrize("tokens", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_sorted_pairs(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    select = (torch.rand(tokens, 5, generator=g) < 0.4).float()
    select[:, 2] = 0
    slot, starts = sort_pairs(select, tokens * 5)
    places = [t * 5 + e for e in range(5) for t in range(tokens) if select[t, e]]
    assert slot[: len(places)].tolist() == places
    assert (slot[len(places) :] == tokens * 5).all()
    for b, row in enumerate(starts.tolist()):
        before = [sum(1 for p in places if p % 5 < e) for e in range(5)]
        mine = [int((select[: b * BLOCK, e] != 0).sum()) for e in range(5)]
        assert row == [x + y for x, y in zip(before, mine, strict=True)]


def arguments(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    select = (torch.rand(tokens, 4, generator=g) < 0.5).to(dtype)
    select[:, 3] = 0
    blocks = [normal(4, 6, 10) for _ in range(3)]
    return [normal(tokens, 10), select, *blocks, None, None, normal(10)]


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_dead_experts_are_not_read(tokens: int) -> None:
    args = arguments(tokens)
    for packed in args[2:5]:
        assert packed is not None
        packed[3] = float("nan")
    assert routed_ffn(*args, key_of(SILU), 4).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 18])
def test_half(tokens: int) -> None:
    """Rounded once, at the neurons: within that rounding of float32."""
    dtype = torch.float16
    args = arguments(tokens, dtype)
    wide = [None if a is None else a.float() for a in args]
    y = routed_ffn(*args, key_of(SILU), 4)
    wanted = routed_ffn(*wide, key_of(SILU), 4)
    x, select, up, gate, down = wide[:5]
    assert x is not None and select is not None and up is not None and down is not None
    h = SILU(x @ up.flatten(0, 1).t(), x @ gate.flatten(0, 1).t())  # type: ignore[union-attr]
    size = (h.abs() * select.repeat_interleave(6, 1)) @ down.flatten(0, 1).abs()
    # half a unit in the last place of every neuron, and float32's own error beside it
    assert ((y - wanted).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * size + 1e-5).all()


def test_interpreter_has_no_bfloat16() -> None:
    with pytest.raises(Refused, match="bfloat16"):
        routed_ffn(*arguments(3, torch.bfloat16), key_of(SILU), 4)


def test_runs_are_equal_bit_for_bit() -> None:
    args = arguments(70)
    assert torch.equal(*[routed_ffn(*args, key_of(SILU), 4) for _ in range(2)])


def test_no_tokens() -> None:
    args = [None if a is None else a.requires_grad_() for a in arguments(0)]
    y = routed_ffn(*args, key_of(SILU), 4)
    y.sum().backward()
    for name, tensor in zip(NAMES, args, strict=True):
        assert y.shape == (0, 10)
        assert tensor is None or (tensor.grad is not None and not tensor.grad.any()), name


def test_operator_is_registered_in_full() -> None:
    args = [None if a is None else a.requires_grad_() for a in arguments(18)]
    torch.library.opcheck(
        routed_ffn,
        (*args, key_of(SILU), 4),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.args = [*arguments(5)[2:], key_of(SILU), 4]

    def forward(self, x: Tensor, select: Tensor) -> Tensor:
        return routed_ffn(x * 2, select, *self.args)


def test_export_sees_one_operator() -> None:
    layer = Layer()
    x, select = arguments(5)[:2]
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = ({0: tokens}, {0: tokens})
    exported = torch.export.export(layer, (x, select), dynamic_shapes=shapes)
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.sparsify.routed_ffn.default]
    assert len(calls) == 1
    x, select = arguments(9)[:2]
    assert torch.equal(exported.module()(x, select), layer(x, select))


def test_compile_without_breaks() -> None:
    layer = Layer()
    x, select = arguments(5)[:2]
    assert x is not None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = run(leaf, select)
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# ---------------------------------------------------------------------- in place of eager


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 12)])
@pytest.mark.parametrize("dropped", [True, False])
def test_kernel_is_eager(gated: bool, shape: tuple[int, ...], dropped: bool) -> None:
    layer = Dense(gated=gated, dropped=dropped, dtype=torch.float32, active=0.5)
    module, x = layer.routed().requires_grad_(False), layer.x(*shape)
    wanted, counted = module(x), copy.copy(module.counter)
    module.counter.reset()
    kernel = lower_ffn(module)
    found = kernel(module, x)
    assert found is not None
    assert found.shape == x.shape and found.dtype == x.dtype
    # 24 neurons of 12 inputs: (12 + 24) roundings of sums of that size, as derived in ffn_cases
    torch.testing.assert_close(found, wanted, rtol=0, atol=80 * 2**-24 * float(wanted.abs().max()))
    assert module.counter == counted
    module.kernel = kernel
    assert torch.equal(module(x), found)
    assert kernel(module, x.double()) is None
    module.router.set_active(1.0)
    assert kernel(module, x) is None


def test_kernel_with_threshold() -> None:
    layer = Dense(dtype=torch.float32)
    module, x = layer.routed().requires_grad_(False), layer.x(21)
    module.router.rule = "threshold"
    module.router.calibrate(x)
    module.router.set_active(0.5)
    wanted, counted = module(x), copy.copy(module.counter)
    module.counter.reset()
    found = lower_ffn(module)(module, x)
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=0, atol=80 * 2**-24 * float(wanted.abs().max()))
    assert module.counter == counted


def test_refused() -> None:
    layer = Dense(gated=False)
    layer.activation = Program(("up",), (Step("y", "aten.sin.default", (Ref("up"),)),), "y")
    with pytest.raises(Refused, match=r"aten\.sin\.default"):
        lower_ffn(layer.routed())
    assert functions(key_of(SILU)) is functions(key_of(SILU))
