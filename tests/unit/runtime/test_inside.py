"""Input routing inside experts: against a loop over tokens and neurons, and what is really read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsify
from sparsify.errors import BadInput
from sparsify.runtime.dial import routers
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.inputs import Magnitude
from sparsify.runtime.inside import LiveNeurons
from sparsify.runtime.spec import from_spec
from sparsify.runtime.training import Thresholds, masked, resettle
from sparsify.weights import dense_weights
from tests.contract.zoo_captures import captured
from tests.unit.runtime.examples import Dense

HIDDEN = 60
WAYS = pytest.mark.parametrize("dispatch", ["auto", "grouped", "masked"])


def made(
    experts: int = 20,
    *,
    rule: str = "threshold",
    centre: bool = True,
    experts_live: float = 0.5,
    live: float = 0.5,
    dtype: torch.dtype = torch.float64,
    hidden: int = HIDDEN,
    width: int = 12,
) -> tuple[Dense, RoutedFFN]:
    """A routed layer with stand-ins and biases, and neurons routed inside."""
    dense = Dense(width=width, hidden=hidden, experts=experts, dropped=True, dtype=dtype)
    module = dense.routed()
    neurons = dense.hidden(dense.x(300))
    mean = neurons.mean(0) if centre else None
    select = Magnitude(dense.down.norm(dim=0), mean, rule=rule)
    select.calibrate(select.centred(neurons))
    module.host("down", LiveNeurons.within(select, module.order, experts))
    module.router.set_active(experts_live)
    assert module.inside is not None
    module.inside.set_active(live)
    return dense, module


def loop(dense: Dense, module: RoutedFFN, x: Tensor) -> tuple[Tensor, int]:
    """Token by token, expert by expert, neuron by neuron; and how many neurons were live."""
    inside, m, read = module.inside, module.hidden, 0
    assert inside is not None
    out = []
    live_experts = module.router(x) != 0
    scale = dense.down.norm(dim=0).float()
    centre = torch.zeros(HIDDEN, dtype=x.dtype)
    if inside.centre is not None:
        centre[dense.order] = inside.centre
    hiddens = dense.hidden(x)
    for row, hidden, experts in zip(x, hiddens, live_experts, strict=True):
        value = ((hidden - centre).float().abs() * scale).tolist()
        y = torch.zeros_like(row) if dense.down_bias is None else dense.down_bias.clone()
        for e in range(module.experts):
            if not experts[e]:
                assert dense.dropped is not None
                y += dense.dropped[e]
                continue
            mine = dense.order[e * m : (e + 1) * m].tolist()
            if inside.rule == "top-k":
                keep = max(round(m * inside.active), 1)
                alive = set(sorted(mine, key=lambda j: -value[j])[:keep])
            else:
                alive = {j for j in mine if value[j] > float(inside.threshold)}
            read += len(alive)
            for j in mine:
                y += (hidden[j] if j in alive else centre[j]) * dense.down[:, j]
        out.append(y)
    return torch.stack(out), read


@WAYS
@pytest.mark.parametrize("tokens", [1, 3, 11])  # picked, read by token, one product
@pytest.mark.parametrize("rule", ["threshold", "top-k"])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("experts_live", [0.4, 1.0])
def test_against_a_loop(
    dispatch: str, tokens: int, rule: str, centre: bool, experts_live: float
) -> None:
    for experts in (4, 20):  # 20: few tokens are picked
        dense, module = made(experts, rule=rule, centre=centre, experts_live=experts_live)
        module.dispatch = dispatch  # type: ignore[assignment]
        x = dense.x(tokens)
        assert module.inside is not None
        with torch.no_grad():
            expected, read = loop(dense, module, x)
            module.counter.reset()
            torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)
        counter, wanted = module.inside.counter, module.counter.units_live * module.hidden
        assert 0 < read < wanted
        assert counter.units_live == read
        assert counter.units_total == wanted
        assert counter.rows_dense == tokens * HIDDEN
        if dispatch == "masked":
            assert counter.rows == tokens * HIDDEN
        elif tokens <= 3:
            assert counter.rows == read  # every row that is read is live for its token
        else:
            assert read <= counter.rows <= wanted


@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("experts", [4, 20])
def test_dead_rows_are_not_read(experts: int, tokens: int) -> None:
    dense, module = made(experts, rule="top-k", centre=False)
    x = dense.x(1).expand(tokens, -1)  # the same neurons are dead for all
    inside = module.inside
    assert inside is not None
    with torch.no_grad():
        before = module(x)
        hidden = dense.hidden(x[0])[dense.order].view(experts, -1)
        scores = hidden.float().abs() * inside.scale.view(experts, -1)
        dead = ~inside.live_all(scores) | (module.router(x)[0] == 0)[:, None]
        assert dead.sum() > HIDDEN // 2
        module.down[dead] = float("nan")
        torch.testing.assert_close(module(x), before)


def test_all_live_is_what_it_was_bit_for_bit() -> None:
    for tokens in (1, 30):
        for experts_live in (0.5, 1.0):
            dense, module = made(live=1.0, experts_live=experts_live)
            plain = dense.routed()
            plain.router.set_active(experts_live)
            x = dense.x(tokens)
            with torch.no_grad():
                assert torch.equal(module(x), plain(x))
                module.dispatch = plain.dispatch = "grouped"  # what claims are proven on
                assert module.inside is not None
                module.inside.counter.reset()
                torch.testing.assert_close(module(x), plain(x), rtol=1e-12, atol=1e-12)
                assert module.inside.counter.units_live == module.inside.counter.units_total > 0


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 5), ()])
@WAYS
def test_shapes(shape: tuple[int, ...], dispatch: str) -> None:
    dense, module = made()
    module.dispatch = dispatch  # type: ignore[assignment]
    x = dense.x(*shape)
    with torch.no_grad():
        y = module(x)
        assert y.shape == x.shape
        if len(shape) == 2 and x.numel():
            rows = x.reshape(-1, dense.width)
            torch.testing.assert_close(y.view_as(rows), module(rows))


@WAYS
def test_gradients(dispatch: str) -> None:
    dense, module = made(4, hidden=16, width=4)
    module.dispatch = dispatch  # type: ignore[assignment]
    for p in module.parameters():
        p.requires_grad_(True)
    x = dense.x(3).requires_grad_()
    trained = {n: p for n, p in module.named_parameters() if not n.startswith("router")}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        found = dict(zip(trained, values, strict=True))
        out: Tensor = torch.func.functional_call(module, found, (x,))
        return out

    fixed = module.router(x).detach()
    module.router.forward = lambda *_: fixed  # type: ignore[method-assign]
    assert "offset" in trained
    assert torch.autograd.gradcheck(run, (x, *trained.values()))


def test_routers_learn_through_masked_dispatch() -> None:
    dense, module = made(20)
    x = dense.x(12)
    for p in module.parameters():
        p.requires_grad_(True)
    with torch.no_grad():
        expected = module(x)
    with masked(module):
        y = module(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert module.router.weight.grad is not None
    assert bool((module.router.weight.grad.abs().sum(1) > 0).all())  # dead experts' scores too
    for p in (module.up, module.down, module.offset):
        assert p is not None and p.grad is not None and p.grad.abs().sum() > 0


def test_thresholds_follow_training() -> None:
    dense, module = made(20, dtype=torch.float32)
    inside = module.inside
    assert inside is not None
    module.pass_name, inside.pass_name = "ffn-moe", "hidden-route"
    with torch.no_grad():
        module.up.mul_(3.0)  # neurons grow: thresholds of before let too many through
    x = dense.x(400)

    def share() -> float:
        inside.counter.reset()
        with torch.no_grad():
            module(x)
        return inside.counter.live_fraction

    assert share() > 0.6
    x.requires_grad_()
    with Thresholds(module, rate=0.5), masked(module):
        for _ in range(12):
            module(x)
        inside.counter.reset()
        module(x)
        assert inside.counter.live_fraction == pytest.approx(0.5, abs=0.03)
    assert share() > 0.6  # what training adds is not kept ...
    resettle(module, lambda: module(x))
    assert share() == pytest.approx(0.5, abs=0.03)  # ... it is fitted anew


def test_spec_and_half_types() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        dense, module = made(dtype=torch.float32)
        module = module.to(dtype)
        again = from_spec(module.spec())
        again.load_state_dict(module.state_dict())
        x = dense.x(9).to(dtype)
        with torch.no_grad():
            found = module(x)
            assert found.dtype == dtype
            assert torch.equal(again(x), found)
            wide = copy.deepcopy(module).float()
            torch.testing.assert_close(found.float(), wide(x.float()), rtol=0.1, atol=0.1)


def test_cost_and_dense_weights() -> None:
    dense, module = made(experts_live=0.5)
    inside = module.inside
    assert inside is not None
    full = dense.routed()
    full.router.set_active(0.5)
    live = full.router.live_units(0.5) * full.hidden * full.width
    offset = HIDDEN // module.hidden * module.width
    expected = full.cost().flops - 2 * live * 0.5 + 2 * offset
    assert module.cost().flops == pytest.approx(expected)
    inside.set_active(1.0)
    assert module.cost() == full.cost()
    for role, tensor in module.dense_weights().items():
        assert torch.equal(tensor, getattr(dense, role))


def test_what_cannot_be_hosted() -> None:
    _, module = made()
    assert module.hosts == ()  # one is in already
    plain = Dense().routed()
    assert plain.hosts == ("down",)
    select = LiveNeurons(torch.ones(24), experts=6)
    for role, part in (("up", select), ("down", plain.router)):
        with pytest.raises(BadInput, match="inside"):
            plain.host(role, part)
    with pytest.raises(BadInput, match="3 experts of 8 neurons"):
        plain.host("down", LiveNeurons(torch.ones(24), experts=3))
    with pytest.raises(BadInput, match="threshold or top-k"):
        LiveNeurons(torch.ones(24), experts=6, rule="top-p")
    with pytest.raises(BadInput, match="do not divide"):
        LiveNeurons(torch.ones(24), experts=5)


def test_compiled_and_calibrated() -> None:
    tokens = torch.randint(3, 120, (16, 32), generator=torch.Generator().manual_seed(2))
    pipeline = "ffn-moe{active=0.5},hidden-route{active=0.5}"
    model = sparsify.compile(captured("llama"), pipeline, calibration=tokens.split(4))
    moe, route = model.report.steps
    said = {r.region: r for r in route.remarks}
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert said[f"{layer}.down_proj"].kind == "applied"
        assert said[f"{layer}.down_proj"].reason.startswith("inside the experts")
        assert said[f"{layer}.up_proj"].kind == "left"
        assert "strided" in said[f"{layer}.up_proj"].reason
        found = [e for e in route.evidence if e.region == f"{layer}.down_proj"]
        assert found and found[0].ok and found[0].error > 0  # the layer's sum, reordered
    moved = {m.dense for m in route.weights}
    assert not any("mlp" in name for name in moved)
    assert any("mlp.down" in m.dense for m in moe.weights)
    inside = {p: m for p, m in model.named_modules() if isinstance(m, LiveNeurons)}
    assert len(inside) == 2
    assert all(m.settled is not None and m.settled_alone is not None for m in inside.values())

    def realised(active: float, pass_name: str | None) -> dict[str, float]:
        model.set_active(1.0)
        model.set_active(active, pass_name=pass_name)
        model.reset_counters()
        with torch.no_grad():
            model(input_ids=tokens)
        for path, m in inside.items():
            assert model.realised()[path] == pytest.approx(m.active, abs=0.03)
        return model.realised()

    both, alone = realised(0.5, None), realised(0.5, "hidden-route")
    for found, experts in ((both, 0.5), (alone, 1.0)):
        live = [share for path, share in found.items() if path.endswith("moe")]
        assert sum(live) / 2 == pytest.approx(experts, abs=0.03)
        assert all(0.1 < found[path] < 0.9 for path in inside)
    sizes = {p: r.routed * r.unit_cost for p, r in routers(model, None, "hidden-route")}
    spent = sum(alone[p.removesuffix(".select")] * size for p, size in sizes.items())
    assert len(sizes) == 10
    assert spent / sum(sizes.values()) == pytest.approx(0.5, abs=0.03)  # one budget for all


@pytest.mark.parametrize(
    "pipeline", ["ffn-moe,hidden-route,depth-mor", "ffn-moe,depth-mor,hidden-route"]
)
def test_beside_depth_routing(pipeline: str) -> None:
    """A layer whose module went into a recursion step is no host any more."""
    model = sparsify.compile(captured("llama"), pipeline)
    assert model.report.ok
    inside = [m for m in model.modules() if isinstance(m, LiveNeurons)]
    route = next(s for s in model.report.steps if s.pass_name == "hidden-route")
    down = [r.kind for r in route.remarks if r.region.endswith("down_proj")]
    before = pipeline.endswith("depth-mor")  # else the second layer is in the step already
    assert down == ["applied", "applied" if before else "left"]
    assert len(inside) == down.count("applied")


def test_second_run_and_other_passes_say_why() -> None:
    model = sparsify.compile(captured("llama"), "ffn-moe,hidden-route,hidden-route,hidden-mohd")
    _, _, again, other = model.report.steps
    for step, reason in ((again, "already rewritten by hidden-route"), (other, "hidden-route")):
        found = [r for r in step.remarks if r.region.endswith("mlp.down_proj")]
        assert [r.kind for r in found] == ["left", "left"]
        assert all(reason in r.reason for r in found)


def test_saved_and_loaded(tmp_path: Path) -> None:
    tokens = torch.randint(3, 120, (8, 32), generator=torch.Generator().manual_seed(2))
    pipeline = "ffn-moe{active=0.5},hidden-route{active=0.5}"
    model = sparsify.compile(captured("gpt2"), pipeline, calibration=tokens.split(4))
    model.save(tmp_path / "out")
    again = sparsify.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert sum(isinstance(m, LiveNeurons) for m in again.modules()) == 2
    assert sparsify.verify(tmp_path / "out").ok
    moves = [m for step in model.report.steps for m in step.weights]
    dense = dict(sparsify.zoo.build("gpt2").model.named_parameters())
    for name, tensor in dense_weights(again, moves).items():
        assert tensor.shape == dense[name].shape
