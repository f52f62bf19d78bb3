"""The export as a whole: trace, translate, write, and hold the file against the model."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsify.codegen.onnx import (
    choice,
    client_files,
    parity,
    rounded,
    targets,
    trace,
    translate,
    write,
)
from sparsify.codegen.onnx.case import RELATIVE, Case
from sparsify.codegen.onnx.needs import EXTRA, need
from sparsify.codegen.onnx.weights import Weights
from sparsify.core import Remark
from sparsify.errors import BadInput, ParityFailed
from sparsify.runtime.model import SparseModel

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: the graph's file first, then its weights' where they are apart.
        target, opset: what it needs of a runtime; active: router -> the budget in the file.
        forms: what routed modules became -> how many; operators: how many of each.
        rewrites: what is written as larger operators than it was traced in -> how many.
        cases: the file against the model; empty where it was not asked for. Of a file with rounded
            weights more: see :mod:`sparsify.codegen.onnx.rounded`.
        weights: what became of the float weights.
        choices: with ``routing="auto"``, what was measured and chosen for every layer.
        beside: names of files for clients, where a folder was written.
    """

    files: tuple[Path, ...]
    target: str
    opset: int
    active: dict[str, float]
    forms: dict[str, int]
    operators: dict[str, int]
    cases: tuple[Case, ...]
    weights: Weights
    choices: tuple[choice.Choice, ...] = ()
    beside: tuple[str, ...] = ()
    rewrites: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What was chosen for every layer, as a report holds it."""
        return tuple(made.remark for made in self.choices)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "files": [str(file) for file in self.files],
            "bytes": self.size,
            "beside": list(self.beside),
            "target": self.target,
            "opset": self.opset,
            "active": self.active,
            "forms": self.forms,
            "rewrites": dict(self.rewrites),
            "operators": self.operators,
            "choices": [made.to_dict() for made in self.choices],
            "weights": dataclasses.asdict(self.weights),
            "parity": [
                {**dataclasses.asdict(c), "relative": c.relative, "ok": c.ok} for c in self.cases
            ],
        }

    def text(self) -> str:
        """For the terminal."""
        lines = [
            f"wrote {self.files[0]}: {self.target}, opset {self.opset}, {self.size / 1e6:.1f} MB"
            + (f" with {self.files[1].name}" if len(self.files) > 1 else "")
        ]
        written = [*self.forms.items(), *self.rewrites.items()]
        lines += [f"  {count} x {what}" for what, count in written]
        lines += [f"  {line}" for line in choice.told(self.choices)]
        if self.beside:
            lines.append(f"  beside it: {', '.join(self.beside)}")
        if self.weights.precision != "float32":
            lines.append(f"  {self.weights.text()}")
        return "\n".join([*lines, *(f"  {case.text()}" for case in self._shown())])

    def _shown(self) -> list[Case]:
        """All against the model; of what else the file is held against the worst."""
        shown = [case for case in self.cases if case.against == "model"]
        for against in dict.fromkeys(case.against for case in self.cases if case not in shown):
            group = [case for case in self.cases if case.against == against]
            shown.append(max(group, key=lambda case: case.relative))
        return shown


def export(
    model: SparseModel,
    path: str | os.PathLike[str],
    *,
    target: str = "portable",
    opset: int | None = None,
    external_data: bool | None = None,
    routing: str | None = None,
    tokens: int = 1,
    weights: str | None = None,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write ``model`` at its present budget as ONNX; see :meth:`SparseModel.export`."""
    if write.is_folder(path):
        options: dict[str, Any] = {
            "target": target, "opset": opset, "external_data": external_data, "routing": routing,
            "tokens": tokens, "weights": weights, "check": check, "progress": progress,
        }  # fmt: skip
        served: Exported = client_files.in_folder(
            model, path, force, lambda file: export(model, file, **options)
        )
        return served
    place = Path(path)
    routing = targets.routing(target, routing)
    precision = weights or _precision(model)
    version = targets.check(target, routing, opset, precision)
    if tokens < 1:
        raise BadInput(f"a call of {tokens} tokens cannot be timed")
    need(*(EXTRA if check or routing == "auto" else EXTRA[:3]))
    write.check_place(place, force=force)
    if not model.example:
        raise BadInput(
            "the model has no example to trace with", help="compile it again, with an example"
        )
    model = _in_float32(model)
    tell = _teller(progress)
    tell()
    # forms are timed in float32: MoE gains there at sizes where QMoE, its like in codes, does not
    coded = precision in targets.BITS
    with choice.chosen(model, target, routing, tokens, moe=not coded) as how:
        return _export(
            model, place, how, tell, target=target, version=version, routing=routing,
            precision=precision, external_data=external_data, check=check, force=force,
        )  # fmt: skip


def _export(
    model: SparseModel,
    place: Path,
    how: choice.Chosen,
    tell: Callable[[], None],
    *,
    target: str,
    version: int,
    routing: str,
    precision: str,
    external_data: bool | None,
    check: bool,
    force: bool,
) -> Exported:
    graph = trace.formed(model, how.way, how.ways)
    program = trace.traced(graph, model)
    tell()
    made = translate.translated(program, model.call_spec, version, target)
    made.metadata_props.update(
        {
            "sparsify.pipeline": model.pipeline,
            "sparsify.target": target,
            "sparsify.routing": routing,
        }
    )
    done, proof = Weights("float32", {}, {}), None
    if precision != "float32":
        done, proof = rounded.rounded(model, made, precision, graph, place, check=check)
        _hold(proof.cases if proof else (), model)
    tell()
    with write.writing(made, place, external=external_data, force=force) as file:
        tell()
        cases = proof.of(file) if proof else parity.compare(model, graph, file) if check else ()
        _hold(cases, model)
    tell()
    operators: dict[str, int] = {}
    for node in made.graph.all_nodes():
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return Exported(
        write.files_of(place), target, version, model.active, trace.told(graph),
        dict(sorted(operators.items())), cases, done, how.choices,
        rewrites=translate.rewrites(made),
    )  # fmt: skip


def _precision(model: SparseModel) -> str:
    """That of the model's own weights."""
    name = str(model.dtype).removeprefix("torch.")
    if model.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise BadInput(
            f"a {name} model cannot be exported",
            help="model.float() first, or compile it with dtype='float32'",
        )
    return name


def _in_float32(model: SparseModel) -> SparseModel:
    """Itself, or for a half-precision model a copy that computes in float32, weights unchanged."""
    if _precision(model) == "float32":
        return model
    wide: SparseModel = copy.deepcopy(model).float()
    return wide


def _teller(progress: Progress | None) -> Callable[[], None]:
    """Called before every step, and at the end."""
    done = iter(range(5))

    def tell() -> None:
        at = next(done)
        if progress is not None:
            progress("export", at, 4)

    return tell


def _hold(cases: tuple[Case, ...], model: SparseModel) -> None:
    """ParityFailed where a case is off."""
    if all(case.ok for case in cases):
        return
    worst = max((case for case in cases if case.held), key=lambda case: case.relative)
    other = "the model" if worst.against == "model" else "float32 with the same weights"
    raise ParityFailed(
        f"the exported {model.call_spec.model} differs from {other}, so it was not kept",
        why=f"{worst.name}: relative error {worst.relative:.1e}, allowed {RELATIVE:.0e}",
        where="\n".join(case.text() for case in cases),
        help="check=False (--no-check) keeps the file",
    )
