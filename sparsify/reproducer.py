"""Reproducers: a failed region cut out of its model, small enough to send, run from a folder.

The folder is a saved sparse model that holds just the region: its routed modules, the operations
between them, the real activations that entered it, and the dense result. ``reproducer.json`` has
the claim, the tolerance, the pipeline and the versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.core import Claim
from sparsify.errors import BadCheckpoint, SparsifyError
from sparsify.evidence import dense_limit, error_between, forced_values
from sparsify.probe import attribute
from sparsify.regions import Region
from sparsify.report import Evidence
from sparsify.runtime.calling import ModuleCall, Slot
from sparsify.runtime.checkpoint import load_folder
from sparsify.runtime.graph import assemble, attach
from sparsify.runtime.model import SparseModel

FILE = "reproducer.json"


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A reproducer run again: ``ok`` means the claim holds now."""

    folder: str
    pipeline: str
    region: str
    then: Evidence
    now: Evidence

    @property
    def ok(self) -> bool:
        """Whether the claim holds now."""
        return self.now.ok

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format": "sparsify-reproduction", "format_version": 1, "ok": self.ok,
            **dataclasses.asdict(self),
        }  # fmt: skip

    def text(self, width: int = 100) -> str:
        """Then and now."""
        verdict = "the claim holds now" if self.ok else "reproduced: the claim still fails"
        return (
            f"{self.pipeline} at {self.region}: {verdict}\n"
            f"  then  error {self.then.error:.3g}, tolerance {self.then.tolerance:.3g}\n"
            f"  now   error {self.now.error:.3g}, tolerance {self.now.tolerance:.3g}"
        )


def write_reproducer(
    base: str,
    gm: fx.GraphModule,
    example: Sequence[Tensor],
    region: Region,
    expected: Tensor,
    pipeline: str,
    evidence: Evidence,
    marks: Mapping[fx.Node, Tensor],
) -> str | None:
    """Write the region's reproducer under ``base``; its path, or None if that is impossible."""
    digest = hashlib.sha256(f"{pipeline}|{region.path}|{evidence.error}".encode()).hexdigest()[:8]
    folder = Path(base) / f"sparsify-claim-{digest}"
    try:
        model = cut_out(gm, example, region, expected, marks)
        model.pipeline = pipeline
        model.save(folder, force=True)
        data = {
            "pipeline": pipeline,
            "region": region.path,
            "where": region.where,
            "evidence": dataclasses.asdict(evidence),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        }
        (folder / FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except (SparsifyError, OSError):
        return None  # the claim's failure is the news; its message says there is no reproducer
    return str(folder)


def cut_out(
    gm: fx.GraphModule,
    example: Sequence[Tensor],
    region: Region,
    expected: Tensor,
    marks: Mapping[fx.Node, Tensor],
) -> SparseModel:
    """The rewritten region alone, with the values that enter it in a dense run as its example."""
    result = region.ports["y"]
    inside = _inside(region)
    entering = [
        n for node in gm.graph.nodes if node in inside for n in node.all_input_nodes
        if n not in inside and n.op != "get_attr"
    ]  # fmt: skip
    entering = list(dict.fromkeys(entering))
    values = forced_values(gm, example, marks, entering)
    root = nn.Module()
    graph = fx.Graph()
    twin: dict[fx.Node, Any] = {}
    tensors: list[Tensor] = []
    for node in entering:
        if isinstance(values[node], Tensor):
            twin[node] = graph.placeholder(node.name)
            tensors.append(values[node].detach().clone())
        else:
            twin[node] = values[node]
    for node in gm.graph.nodes:
        if node.op == "get_attr" and any(user in inside for user in node.users):
            attach(root, str(node.target), attribute(gm, str(node.target)))
            twin[node] = graph.get_attr(str(node.target))
        if node not in inside:
            continue
        if node.op == "call_module":
            attach(root, str(node.target), gm.get_submodule(str(node.target)))
        args = fx.map_arg(node.args, lambda n: twin[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: twin[n])
        twin[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
    graph.output((twin[result],))
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    slots = tuple(
        Slot(n, tuple(t.shape), (), t.is_floating_point())
        for n, t in zip(names, tensors, strict=True)
    )
    call = ModuleCall(
        slots, tuple(names), {n: {"kind": "tensor"} for n in names}, {"kind": "tensor"}, "region"
    )
    return SparseModel(assemble(graph, root), call, example=tensors, golden=(expected,))


def _inside(region: Region) -> set[fx.Node]:
    """Nodes between the region's input and result; keys, values and masks enter from outside."""
    stop = {node for name, node in region.ports.items() if name in ("x", "k", "v")}
    stop |= {node for name, node in region.ports.items() if name.startswith("score.")}
    first = region.ports["x"]
    order = int(first.meta["order"])
    inside: set[fx.Node] = set()
    depends: dict[fx.Node, bool] = {}

    def reaches(node: fx.Node) -> bool:
        if node is first:
            return True
        if node in stop or int(node.meta["order"]) < order:
            return False
        if node not in depends:
            depends[node] = any(list(map(reaches, node.all_input_nodes)))
            if depends[node]:
                inside.add(node)
        return depends[node]

    reaches(region.ports["y"])
    return inside


def reproduce(folder: str | Path) -> Reproduction:
    """Run a reproducer again.

    Raises:
        BadCheckpoint: the folder is no reproducer, or damaged.
    """
    path = Path(folder)
    try:
        data = json.loads((path / FILE).read_text(encoding="utf-8"))
        then = Evidence(**data["evidence"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{folder} is no reproducer",
            why=f"{FILE}: {error}",
            help="sparsify reproduce takes the folder that a failed claim named",
        ) from None
    model = load_folder(path)
    with torch.no_grad(), dense_limit(model):
        found = model.graph(*model.example)[0]
    worst, scale = error_between(found, model.golden[0])
    tolerance = then.tolerance
    if scale > 0 and then.scale > 0 and Claim("EXACT").kind != then.claim:
        tolerance = then.tolerance * scale / then.scale
    now = dataclasses.replace(
        then, error=worst, scale=scale, tolerance=tolerance, ok=worst <= tolerance
    )
    return Reproduction(str(folder), data["pipeline"], data["region"], then, now)
