"""One feed-forward layer in many hands: dense backends, routed peers, and ours, on equal weights.

A :class:`Layer` holds gate, up (F, D) and down transposed (F, D): gated SiLU, no biases. The router
is (N, D): a token uses the K experts with the highest scores, each with weight one; expert e is the
neurons ``e * F / N`` to ``(e + 1) * F / N``. Every function here returns ``f(x (T, D)) -> (T, D)``.
Weights that a backend wants in another layout are laid out (and prepacked) before anything is
timed; layouts that several of them share are made once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.program import Program, Ref, Step
from sparsify.runtime.router import Router

Call = Callable[[Tensor], Any]
linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
# All copies of ONNX Runtime's sessions share one pool of threads. A process that did so once can
# open no session with threads of its own any more: tests turn it off.
ONE_POOL = True
SILU = Program(
    ("up", "gate"),
    (
        Step("s", "aten.silu.default", (Ref("gate"),)),
        Step("h", "aten.mul.Tensor", (Ref("s"), Ref("up"))),
    ),
    "h",
)


@dataclasses.dataclass(eq=False)
class Layer:
    """gate, up, down: (F, D) float32, one neuron per row."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @staticmethod
    def random(width: int, hidden: int, seed: int = 0) -> Layer:
        """Standard normal, scaled so that the result is about one."""
        g = torch.Generator().manual_seed(seed)
        gate, up, down = (torch.randn(hidden, width, generator=g) for _ in range(3))
        return Layer(gate.div_(width**0.5), up.div_(width**0.5), down.div_(hidden**0.5))

    def copy(self) -> Layer:
        return Layer(self.gate.clone(), self.up.clone(), self.down.clone())

    def to(self, *where: Any) -> Layer:
        """On another device, in another dtype."""
        return Layer(self.gate.to(*where), self.up.to(*where), self.down.to(*where))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.gate, self.up, self.down))

    @functools.cached_property
    def down_natural(self) -> Tensor:
        """(D, F), as ``nn.Linear`` holds it."""
        return self.down.t().contiguous()

    def split(self, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views (N, m, D)."""
        width = self.gate.shape[1]
        gate, up, down = (t.view(experts, -1, width) for t in (self.gate, self.up, self.down))
        return gate, up, down

    def head(self, active: float) -> Layer:
        """The first neurons only: what static pruning leaves. Views."""
        keep = round(active * len(self.gate))
        return Layer(self.gate[:keep], self.up[:keep], self.down[:keep])


# ---------------------------------------------------------------------------- dense


def natural(layer: Layer) -> Call:
    """``F.linear`` on the weights as a checkpoint holds them."""
    gate, up, down = layer.gate, layer.up, layer.down_natural
    return lambda x: linear(silu(linear(x, gate)) * linear(x, up), down)


def by_neuron(layer: Layer) -> Call:
    """``F.linear`` for gate and up, ``@`` for down: one neuron per row of all three."""
    gate, up, down = layer.gate, layer.up, layer.down
    return lambda x: (silu(linear(x, gate)) * linear(x, up)) @ down


def transposed(layer: Layer) -> Call:
    """``x @ W.t()`` with the transposes laid out beforehand."""
    gate, up, down = layer.gate.t().contiguous(), layer.up.t().contiguous(), layer.down
    return lambda x: (silu(x @ gate) * (x @ up)) @ down


def onednn(layer: Layer, tokens: int) -> Call:
    """oneDNN's linear on weights packed for this number of tokens (what inductor calls)."""
    pack, run = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    gate, up, down = (pack(w, tokens) for w in (layer.gate, layer.up, layer.down_natural))

    def call(x: Tensor) -> Tensor:
        left = run(x, gate, None, "swish", [], "")
        found: Tensor = run(left * run(x, up, None, "none", [], ""), down, None, "none", [], "")
        return found

    return call


def mkl(layer: Layer, tokens: int) -> Call:
    """MKL's packed sgemm, packed for this number of tokens (what inductor calls for float32)."""
    pack, run = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkl._mkl_linear
    pairs = [(pack(w, tokens), w) for w in (layer.gate, layer.up, layer.down_natural)]
    (gate, up, down) = pairs

    def call(x: Tensor) -> Tensor:
        left = silu(run(x, *gate, None, tokens)) * run(x, *up, None, tokens)
        found: Tensor = run(left, *down, None, tokens)
        return found

    return call


def frozen(layers: Sequence[Layer]) -> Call:
    """torch.compile with freezing: x -> every layer's result, the weights constants."""
    import torch._inductor.config as inductor

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number, layer in enumerate(layers):
                for name in ("gate", "up"):
                    self.register_buffer(f"{name}{number}", getattr(layer, name))
                self.register_buffer(f"down{number}", layer.down_natural)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            named = [[getattr(self, f"{n}{i}") for n in ("gate", "up", "down")]
                     for i in range(len(layers))]  # fmt: skip
            return tuple(linear(silu(linear(x, g)) * linear(x, u), d) for g, u, d in named)

    compiled = torch.compile(Stack().eval(), dynamic=False)

    def call(x: Tensor) -> Any:
        with inductor.patch(freezing=True):
            return compiled(x)

    return call


def onnx_dense(layer: Layer) -> Call:
    """ONNX Runtime: three MatMuls (weights prepacked by it), Sigmoid and Mul."""
    nodes = [
        ("MatMul", ["x", "gate"], ["g"], {}),
        ("Sigmoid", ["g"], ["sigmoid"], {}),
        ("Mul", ["g", "sigmoid"], ["silu"], {}),
        ("MatMul", ["x", "up"], ["u"], {}),
        ("Mul", ["silu", "u"], ["h"], {}),
        ("MatMul", ["h", "down"], ["y"], {}),
    ]
    weights = {"gate": layer.gate.t(), "up": layer.up.t(), "down": layer.down}
    known = layer.__dict__  # the same whatever the experts are: made once
    if "onnx" not in known:
        known["onnx"] = _session(nodes, weights, layer.gate.shape[1])
    made: Call = known["onnx"]
    return made


# ---------------------------------------------------------------------------- routed peers


def expert_loop(layer: Layer, router: Tensor, keep: int) -> Call:
    """A loop over the experts as CMoE's code does (arXiv:2502.04416): mask, three linears, add.

    Every expert is visited; those without a token are left at once.
    """
    experts = len(router)
    gate, up, _ = layer.split(experts)
    _, down = _fused(layer, experts)
    parts = [(gate[e], up[e], down[e]) for e in range(experts)]

    def call(x: Tensor) -> Tensor:
        chosen = linear(x, router).topk(keep, dim=-1).indices
        y = torch.zeros_like(x)
        for expert, (g, u, d) in enumerate(parts):
            rows = (chosen == expert).any(-1).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            mine = x[rows]
            y.index_add_(0, rows, linear(silu(linear(mine, g)) * linear(mine, u), d))
        return y

    return call


def huggingface(layer: Layer, router: Tensor, keep: int, implementation: str) -> Call:
    """Mixtral's experts of transformers; ``implementation`` as ``experts_implementation`` there.

    Our routing comes before it (its block would weigh the experts by a softmax).
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, (hidden, width) = len(router), layer.gate.shape
    config = MixtralConfig(
        hidden_size=width, intermediate_size=hidden // experts, num_local_experts=experts,
        num_experts_per_tok=keep, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        block: Any = MixtralExperts(config)
    gate_up, down = _fused(layer, experts)
    block.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    block.down_proj = torch.nn.Parameter(down, requires_grad=False)
    block.eval()

    def call(x: Tensor) -> Any:
        chosen = linear(x, router).topk(keep, dim=-1).indices
        return block(x, chosen, x.new_ones(chosen.shape))

    return call


def _fused(layer: Layer, experts: int) -> tuple[Tensor, Tensor]:
    """Gate and up of an expert one after the other (N, 2m, D), and down (N, D, m); made once."""
    known: dict[int, tuple[Tensor, Tensor]] = layer.__dict__.setdefault("fused", {})
    if experts not in known:
        known.clear()  # of another number of experts
        gate, up, down = layer.split(experts)
        known[experts] = (torch.cat([gate, up], 1), down.transpose(1, 2).contiguous())
    return known[experts]


def grouped(layer: Layer, router: Tensor, keep: int) -> Call:
    """torch's grouped matmul over tokens sorted by expert, two calls, no host sync."""
    experts = len(router)
    gate_up, down = _fused(layer, experts)
    multiply: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    first, second = gate_up.transpose(1, 2), down.transpose(1, 2)

    def call(x: Tensor) -> Tensor:
        chosen = linear(x, router).topk(keep, dim=-1).indices.flatten()
        order = chosen.argsort(stable=True)
        rows = order // keep
        counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
        ones = torch.ones_like(chosen, dtype=torch.int32)
        ends = counts.index_add_(0, chosen, ones).cumsum(0, dtype=torch.int32)
        g, u = multiply(x[rows], first, offs=ends).chunk(2, dim=-1)
        y = multiply(silu(g) * u, second, offs=ends)
        return torch.zeros_like(x).index_add_(0, rows, y)

    return call


def onnx_moe(layer: Layer, router: Tensor, keep: int) -> Call:
    """ONNX Runtime's com.microsoft MoE.

    It weighs experts by a softmax over the router's logits: zeros for the K best (TopK outside) and
    -1e9 for the others make 1/K of each, and K is multiplied into the down projection.
    """
    from onnx import numpy_helper

    experts, (_, width) = len(router), layer.gate.shape
    gate, up, down = layer.split(experts)
    weights = {
        "router": router.t(),
        "gate_up": torch.stack([gate, up], 2).reshape(experts, -1, width),  # rows g0 u0 g1 u1 ...
        "down": down.transpose(1, 2) * keep,
        "keep": torch.tensor([keep]),
    }
    dead = numpy_helper.from_array(np.array([-1e9], np.float32))
    zero = numpy_helper.from_array(np.array([0], np.float32))
    swiglu = {"activation_type": "swiglu", "swiglu_fusion": 1}
    swiglu |= {"activation_alpha": 1.0, "activation_beta": 0.0}
    nodes = [
        ("MatMul", ["x", "router"], ["scores"], {}),
        ("TopK", ["scores", "keep"], ["values", "chosen"], {"sorted": 0}),
        ("Shape", ["scores"], ["all"], {}),
        ("ConstantOfShape", ["all"], ["low"], {"value": dead}),
        ("Shape", ["chosen"], ["some"], {}),
        ("ConstantOfShape", ["some"], ["zeros"], {"value": zero}),
        ("ScatterElements", ["low", "chosen", "zeros"], ["logits"], {"axis": -1}),
        ("MoE", ["x", "logits", "gate_up", "", "down"], ["y"],
         {"domain": "com.microsoft", "k": keep, **swiglu}),
    ]  # fmt: skip
    return _session(nodes, weights, width)


def _session(nodes: Sequence[Any], weights: dict[str, Tensor], width: int) -> Call:
    import onnxruntime
    from onnx import helper, numpy_helper

    made = [
        helper.make_node(op, ins, outs, domain=more.pop("domain", ""), **more)
        for op, ins, outs, more in ((*node[:3], dict(node[3])) for node in nodes)
    ]
    tensors = [numpy_helper.from_array(w.contiguous().numpy(), n) for n, w in weights.items()]
    x, y = (helper.make_tensor_value_info(name, 1, ["T", width]) for name in "xy")
    graph = helper.make_graph(made, "ffn", [x], [y], tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    content = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    del graph, tensors
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = not ONE_POOL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def call(x: Tensor) -> Any:
        return torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])

    return call


@functools.cache
def use_threads(count: int) -> None:
    """As many threads for torch and for all of ONNX Runtime's sessions; once a process."""
    torch.set_num_threads(count)
    if ONE_POOL:
        import onnxruntime

        onnxruntime.set_global_thread_pool_sizes(count, 1)


# ---------------------------------------------------------------------------- ours


def routed(layer: Layer, router: Tensor, active: float) -> RoutedFFN:
    """Our layer, eager, over the same memory."""
    gate, up, down = layer.split(len(router))
    made = RoutedFFN(
        up, gate, down, None, None, None, activation=SILU, router=Router(router, active=active)
    )
    return made.eval()


def lowered(module: RoutedFFN) -> str:
    """Put a kernel into ``module``; returns why there is none, empty where there is one.

    On a GPU that is the Triton kernel, else what ``SparseModel.lower`` would choose.
    """
    if module.up.device.type != "cpu" and _there("sparsify.codegen.triton.lower"):
        triton: Any = importlib.import_module("sparsify.codegen.triton.lower")
        module.kernel = triton.kernel_of(module)
        return ""
    if not _there("sparsify.codegen.lower"):
        return "this tree has no sparsify.codegen.lower: eager stands in"
    lower: Any = importlib.import_module("sparsify.codegen.lower")
    said = lower.lower_module(module)
    if module.kernel is None:
        return f"left eager: {said.reason}"
    return ""


def _there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
