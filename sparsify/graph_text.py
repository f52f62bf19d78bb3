"""A graph as stable text: one line a node, for goldens and for eyes."""

from __future__ import annotations

from torch import fx

from sparsify.probe import shape_of


def graph_text(gm: fx.GraphModule) -> str:
    """``name  op  target(inputs)  shape on the example``, weights where they are read.

    The graph must have run through ``probe.annotate``; shapes are missing otherwise.
    """
    rows = []
    for node in gm.graph.nodes:
        inputs = ", ".join(str(n) for n in node.all_input_nodes)
        called = f"{_target(node)}({inputs})" if node.op.startswith("call") else _target(node)
        rows.append((node.name, _OPS.get(node.op, node.op), called, _value(node)))
    sizes = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [
        f"{name:<{sizes[0]}}  {op:<{sizes[1]}}  {called}  {value}".rstrip()
        for name, op, called, value in rows
    ]
    return "\n".join(lines) + "\n"


_OPS = {
    "placeholder": "input", "get_attr": "weight", "call_function": "call",
    "call_method": "method", "call_module": "module", "output": "output",
}  # fmt: skip


def _target(node: fx.Node) -> str:
    if node.op == "output":
        return ", ".join(str(n) for n in node.all_input_nodes)
    if isinstance(node.target, str):
        return node.target
    module = getattr(node.target, "__module__", "")
    name = getattr(node.target, "__name__", str(node.target))
    return str(node.target) if "." in name or module.startswith("torch") else f"{module}.{name}"


def _value(node: fx.Node) -> str:
    if "shape" in node.meta:
        dtype = str(node.meta["dtype"]).removeprefix("torch.")
        return f"{dtype}{list(shape_of(node))}".replace(" ", "")
    return f"= {node.meta['int']}" if "int" in node.meta else ""
