"""The matcher on small models made for one question each: near misses, fused rows, heads, paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.api import share_clone
from sparsify.capture import capture
from sparsify.match import find
from sparsify.regions import Attention, FeedForward, Matches, NearMiss
from tests.contract.zoo_captures import captured

D, F, H = 16, 32, 4


class Net(nn.Module):
    """Two projections and what a test writes between and around them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(D, F), nn.Linear(D, F), nn.Linear(F, D)
        self.norm = nn.LayerNorm(F)
        self.slope = nn.Parameter(torch.rand(F))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.mix = nn.Linear(D, D)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def matches(forward: Callable[[Any, Tensor], Any]) -> Matches:
    cap = capture(Net(forward), torch.randn(2, 6, D))
    return find(cap.graph, cap.example)


def miss(forward: Callable[[Any, Tensor], Any]) -> NearMiss:
    found = matches(forward)
    assert found.regions == []
    (only,) = found.near_misses
    return only


# ---------------------------------------------------------------------------- feed-forward


def gelu(m: Any, x: Tensor) -> Tensor:
    return functional.gelu(m.up(x))


NEAR_FFN: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "no residual": (
        lambda m, x: torch.tanh(m.down(gelu(m, x))),
        "residual",
        "its result is not added back to the layer's input (it goes to tanh)",
    ),
    "norm of the hidden layer": (
        lambda m, x: x + m.down(m.norm(gelu(m, x))),
        "activation",
        "layer_norm between activation and down projection mixes neurons",
    ),
    "learned tensor": (
        lambda m, x: x + m.down(gelu(m, x) * m.slope),
        "activation",
        "a learned tensor slope acts on the neurons",
    ),
    "learned scalar": (
        lambda m, x: x + m.down(gelu(m, x) * m.scale),
        "activation",
        "the learned scalar scale is part of it",
    ),
    "hidden used outside": (
        lambda m, x: (lambda h: (x + m.down(h), h))(gelu(m, x)),
        "hidden",
        "gelu is also used by output, outside the layer",
    ),
    "gate reads another input": (
        lambda m, x: x + m.down(functional.silu(m.gate(x * 2)) * m.up(x)),
        "gate",
        "gate and up projections read different inputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_FFN)
def test_a_near_miss_names_the_role_that_failed(case: str) -> None:
    forward, role, reason = NEAR_FFN[case]
    found = miss(forward)
    assert (found.kind, found.role, found.reason) == ("FeedForward", role, reason)
    assert found.where.startswith("test_match.py:")


NO_FFN: dict[str, Callable[[Any, Tensor], Any]] = {
    "no nonlinearity": lambda m, x: x + m.down(m.up(x)),
    "one projection": lambda m, x: x + m.mix(x),
}


@pytest.mark.parametrize("case", NO_FFN)
def test_what_is_no_feed_forward_layer_is_no_near_miss(case: str) -> None:
    found = matches(NO_FFN[case])
    assert not found.regions and not found.near_misses


FFN: dict[str, tuple[Callable[[Any, Tensor], Any], str, bool]] = {
    "gelu": (lambda m, x: x + m.down(gelu(m, x)), "gelu", False),
    "swiglu": (lambda m, x: x + m.down(functional.silu(m.gate(x)) * m.up(x)), "silu", True),
    "swiglu, other order": (
        lambda m, x: x + m.down(m.up(x) * functional.silu(m.gate(x))), "silu", True,
    ),
    "bilinear gate": (lambda m, x: x + m.down(torch.tanh(m.gate(x)) * m.up(x)), "tanh", True),
    "quick gelu": (
        lambda m, x: x + m.down((lambda u: u * torch.sigmoid(1.702 * u))(m.up(x))),
        "gelu-quick", False,
    ),
    "squared relu": (lambda m, x: x + m.down(m.up(x).relu().square()), "relu-squared", False),
    "scaled result": (lambda m, x: x + 0.5 * m.down(gelu(m, x)), "gelu", False),
    "residual first": (lambda m, x: m.down(gelu(m, functional.layer_norm(x, (D,)))) + x,
                       "gelu", False),
    "reshaped": (
        lambda m, x: x + m.down(gelu(m, x.reshape(-1, D))).view(2, 6, D), "gelu", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FFN)
def test_spellings_of_a_feed_forward_layer(case: str) -> None:
    forward, activation, gated = FFN[case]
    found = matches(forward)
    assert not found.near_misses
    (region,) = found.regions
    assert isinstance(region, FeedForward)
    assert (region.width, region.hidden) == (D, F)
    assert (region.activation_name, region.gate is not None) == (activation, gated)
    assert region.up.weight_name == "up.weight" and region.down.weight_name == "down.weight"
    if gated:
        assert region.gate is not None and region.gate.weight_name == "gate.weight"


# ---------------------------------------------------------------------------- attention


def heads(x: Tensor, count: int = H) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def attend(m: Any, x: Tensor) -> Tensor:
    y = functional.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))
    return merged(y)


NEAR_ATTENTION: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "gated result": (
        lambda m, x: x + m.o(torch.sigmoid(attend(m, x))),
        "output",
        "the heads' result goes through sigmoid before the output projection",
    ),
    "result used twice": (
        lambda m, x: (lambda y: (x + m.o(y), y))(attend(m, x)),
        "output",
        "the heads' result is also used beside the output projection",
    ),
    "two query projections": (
        lambda m, x: x + m.o(merged(functional.scaled_dot_product_attention(
            heads(m.q(x) + m.mix(x)), heads(m.k(x)), heads(m.v(x))))),
        "query",
        "2 projections feed the queries (1 expected)",
    ),
    "no heads": (
        lambda m, x: x + m.o(functional.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
        "query",
        "q has 3 dimensions, (batch, head, token, feature) expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_ATTENTION)
def test_a_near_miss_of_attention_names_the_role(case: str) -> None:
    forward, role, reason = NEAR_ATTENTION[case]
    found = miss(forward)
    assert (found.kind, found.role, found.reason) == ("Attention", role, reason)
    assert found.where.startswith("test_match.py:")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("spelled", ["sdpa", "eager"])
def test_key_value_heads_are_counted(kv_heads: int, spelled: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        times = H // kv_heads
        k = heads(m.k(x), kv_heads).repeat_interleave(times, dim=1)
        v = heads(m.v(x), kv_heads).repeat_interleave(times, dim=1)
        q = heads(m.q(x))
        if spelled == "sdpa":
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(2, 3) / 2.0, dim=-1) @ v
        return x + m.o(merged(y))

    class Grouped(Net):
        def __init__(self) -> None:
            super().__init__(forward)
            self.k, self.v = (nn.Linear(D, D // H * kv_heads) for _ in range(2))

    cap = capture(Grouped(), torch.randn(2, 6, D))
    (region,) = find(cap.graph, cap.example).regions
    assert isinstance(region, Attention)
    assert (region.heads, region.kv_heads, region.head_dim) == (H, kv_heads, D // H)
    assert region.spelled == spelled and not region.cross


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        # (head, row): blocks of q, k, v (phi3), or q, k, v of each head in turn (gpt-neox)
        ("phi3", [list(range(8 * h, 8 * h + 8)) for h in range(4)]),
        ("gpt-neox", [list(range(24 * h, 24 * h + 8)) for h in range(4)]),
        ("nanogpt", [list(range(8 * h, 8 * h + 8)) for h in range(4)]),
    ],
)
def test_query_rows_of_fused_projections(name: str, rows: list[list[int]]) -> None:
    cap = captured(name)
    found = find(share_clone(cap.graph), cap.example)
    for region in found.regions:
        if not isinstance(region, Attention):
            continue
        assert region.query_rows is not None and region.query_rows.tolist() == rows
        assert region.query.weight_name == region.projection.weight_name
        flat = torch.tensor(rows).flatten()
        assert torch.equal(region.query.weight, region.projection.weight[flat])


def test_halves_of_a_fused_gate() -> None:
    cap = captured("phi3")
    found = find(share_clone(cap.graph), cap.example)
    region = next(r for r in found.regions if isinstance(r, FeedForward))
    assert region.gate is not None and region.gate.rows is not None
    assert region.up.rows is not None
    assert region.gate.rows.tolist() == list(range(96))
    assert region.up.rows.tolist() == list(range(96, 192))


# ---------------------------------------------------------------------------- paths


def test_a_module_called_twice_has_two_paths() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Net(lambda m, x: x + m.down(gelu(m, x)))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x))
            return out

    cap = capture(Shared(), torch.randn(2, 6, D))
    regions = find(cap.graph, cap.example).regions
    assert [r.path for r in regions] == ["layer", "layer#2"]
    assert [(r.index, r.count) for r in regions] == [(0, 2), (1, 2)]


def test_two_layers_inline_have_two_paths() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, F), nn.Linear(F, D)
            self.c, self.d = nn.Linear(D, F), nn.Linear(F, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(torch.relu(self.a(x)))
            return x + self.d(torch.relu(self.c(x)))

    cap = capture(Inline(), torch.randn(2, 6, D))
    regions = find(cap.graph, cap.example).regions
    assert [r.path for r in regions] == ["", "#2"]
    assert [r.up.weight_name for r in regions] == ["a.weight", "c.weight"]  # type: ignore[attr-defined]
