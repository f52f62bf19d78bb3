"""A graph printed as a Python function over the dictionaries of its module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from sparsify.runtime.beside import together
from sparsify.runtime.bound import Bound
from sparsify.runtime.spec import RoutedModule

aten = torch.ops.aten
Function = Callable[..., tuple[Any, ...]]
Calls = Mapping[Any, Callable[..., Any]]

# Overload -> what calls the same one through torch's own argument parser: a third to two thirds of
# the time of a call through torch.ops (1.2 us instead of 2.0 for a product of 576 numbers).
DIRECT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.rsqrt.default: torch.rsqrt,
    aten.sqrt.default: torch.sqrt,
    aten.sin.default: torch.sin,
    aten.cos.default: torch.cos,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.relu.default: torch.relu,
    aten.silu.default: torch._C._nn.silu,
    aten.gelu.default: torch._C._nn.gelu,
    aten.mean.dim: torch.mean,
    aten.softmax.int: torch.softmax,
    aten.matmul.default: torch.matmul,
    aten.addmm.default: torch.addmm,
    aten.linear.default: functional.linear,
    aten.layer_norm.default: torch.layer_norm,
    aten.scaled_dot_product_attention.default: functional.scaled_dot_product_attention,
    aten.cat.default: torch.cat,
    aten.roll.default: torch.roll,
    aten.reshape.default: torch.reshape,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.expand.default: torch.Tensor.expand,
    aten.sym_size.int: torch.Tensor.size,
}

# Stack slots of the function, though it needs a dozen. CPython puts frames into chunks of 16 KiB,
# maps a new one where a call does not fit, and unmaps it when the call returns. A frame of hundreds
# of variables may end just below the end of a chunk, depending on how deep its caller is: then each
# of its own calls maps and unmaps one (20 us; 120 of them made a step of SmolLM2 20 % slower). A
# frame larger than any rest gets a chunk to itself, with a thousand slots to spare behind it.
OWN_CHUNK = 1 << 14


def function(graph: fx.Graph, module: nn.Module, calls: Calls | None = None) -> Function:
    """What ``graph`` computes on the weights and modules of ``module``, as its dictionaries hold
    them at every call; positional inputs, a tuple of outputs.

    Args:
        calls: what to call instead of some operations.
    """
    source, names = text_of(graph, calls or {}, module)
    scope: dict[str, Any] = {**names, "root": module}
    exec(compile(source, "<sparsify graph>", "exec"), scope)
    made: Any = scope["run"]
    made.__code__ = made.__code__.replace(co_stacksize=max(made.__code__.co_stacksize, OWN_CHUNK))
    run: Function = made
    return run


def text_of(graph: fx.Graph, calls: Calls, module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The source of ``run`` and the objects that it names, without ``root`` (the module)."""
    return _Printer(graph, {**DIRECT, **calls}, module).text()


class _Printer:
    def __init__(self, graph: fx.Graph, calls: Calls, root: nn.Module) -> None:
        self.graph = graph
        self.root = root
        self.calls = calls
        self.names: dict[str, Any] = {}
        self._named: dict[int, str] = {}
        self._values: dict[fx.Node, str] = {}
        self._modules: dict[str, str] = {"": "root"}
        self._lines: list[str] = []
        self._wanted: list[tuple[str, ...]] = []  # bound calls: b0, b1, ...

    def text(self) -> tuple[str, dict[str, Any]]:
        last = {used: node for node in self.graph.nodes for used in node.all_input_nodes}
        inputs: list[str] = []
        for number, node in enumerate(self.graph.nodes):
            if node.op == "output":
                outputs = "".join(f"{self._of(value)}, " for value in node.args[0])
                self._lines.append(f"return ({outputs})")
                break
            name = self._values[node] = f"v{number}"
            if node.op == "placeholder":
                inputs.append(name)
                continue
            self._statement(node, name)
            done = [self._values[used] for used in node.all_input_nodes if last[used] is node]
            if node not in last:
                done.append(name)
            if done:  # frees memory as early as the graph's own code does
                self._lines.append(f"{' = '.join(done)} = None")
        if self._wanted:
            self.names["bound"] = Bound(self.root, self._wanted)
            self._lines.insert(
                0, f"{''.join(f'b{n}, ' for n in range(len(self._wanted)))}= bound()"
            )
        body = "".join(f"    {line}\n" for line in self._lines)
        return f"def run({', '.join(inputs)}):\n{body}", self.names

    def _statement(self, node: fx.Node, name: str) -> None:
        target = node.target
        if target is together:
            self._lines.append(f"{name} = {self._bound(node.args[0])}({self._of(node.args[1])})")
        elif node.op == "call_function":
            called = self._object(self.calls.get(target, target))
            self._lines.append(f"{name} = {called}({self._arguments(node)})")
        elif node.op == "call_module":
            routed = isinstance(self.root.get_submodule(str(target)), RoutedModule)
            called = self._bound([str(target)]) if routed else self._module(str(target))
            self._lines.append(f"{name} = {called}({self._arguments(node)})")
        else:
            self._weight(str(target), name)

    def _bound(self, paths: Any) -> str:
        """The variable that holds what calls the modules at ``paths``."""
        self._wanted.append(tuple(paths))
        return f"b{len(self._wanted) - 1}"

    def _weight(self, target: str, name: str) -> None:
        """A parameter; a buffer or what a parametrisation computes, by attribute."""
        owner, _, leaf = target.rpartition(".")
        at = self._module(owner)
        self._lines.append(f"{name} = {at}._parameters.get({leaf!r})")
        self._lines.append(f"if {name} is None: {name} = getattr({at}, {leaf!r})")

    def _module(self, path: str) -> str:
        """The variable that holds the module, read from the dictionaries on the way once."""
        if path not in self._modules:
            owner, _, leaf = path.rpartition(".")
            at = self._module(owner)
            name = self._modules[path] = f"m{len(self._modules)}"
            self._lines.append(f"{name} = {at}._modules[{leaf!r}]")
        return self._modules[path]

    def _arguments(self, node: fx.Node) -> str:
        given = [self._of(value) for value in node.args]
        given += [f"{key}={self._of(value)}" for key, value in node.kwargs.items()]
        return ", ".join(given)

    def _of(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._values[value]
        if type(value) in (int, bool, str, type(None)):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._of, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._of(item)}, ' for item in value)})"
        if isinstance(value, slice):
            return f"slice({self._of((value.start, value.stop, value.step))[1:-1]})"
        return self._object(value)  # floats too: infinity and NaN have no spelling

    def _object(self, value: Any) -> str:
        name = self._named.get(id(value))
        if name is None:
            name = self._named[id(value)] = f"c{len(self._named)}"
            self.names[name] = value  # which also keeps its id from being given again
        return name
