"""Whether the file computes what the model computes: ONNX Runtime against eager, case by case.

Outputs are compared, and selections (:mod:`sparsify.codegen.onnx.selections`). Where these differ,
the outputs may: then the file is held against the model with the file's selections, and each that
differs has to be a tie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sparsify.codegen.onnx import qmoe, selections
from sparsify.codegen.onnx.case import RELATIVE, Agreement, Case, relative
from sparsify.codegen.onnx.custom.files import beside
from sparsify.codegen.onnx.names import input_names
from sparsify.codegen.onnx.needs import need
from sparsify.codegen.onnx.trial_calls import cases, counted, without_padding
from sparsify.evidence import error_between
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.model import SparseModel

Outputs = list[Tensor]


def session(
    path: Path,
    *,
    threads: int = 1,
    float32: bool = False,
    in_turn: bool = False,
    watched: bool = False,
) -> Any:
    """An ONNX Runtime session on the CPU, with the file's own operators where it has some.

    Args:
        float32: products with weights in 4 or 8 bits are computed in float32; without it ONNX
            Runtime rounds their inputs to 8 bits, which is faster.
        in_turn: its threads sleep as soon as a call returns; by default they wait for the next one
            awake, a while, and take the cores from other sessions.
        watched: its selections are outputs too, after the file's own.
    """
    (ort,) = need("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if in_turn:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if float32:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    library, _ = beside(path)
    if library.exists():
        options.register_custom_ops_library(str(library))
    file: str | bytes = str(path)
    if watched:
        file = selections.with_outputs(path)
        place = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(place, str(path.parent))
    with qmoe.in_float32() if float32 else contextlib.nullcontext():
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def greedy(running: Any, ids: Any, count: int) -> tuple[list[int], list[float]]:
    """``count`` tokens after ids (1, T), and the seconds of every call, the prefill's first; with
    the file's own cache."""
    caches = [v for v in running.get_inputs() if v.name.startswith("past_key_values")]
    past = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in caches}
    outputs = [v.name for v in running.get_outputs()]
    seen, found, spent = 0, list[int](), list[float]()
    while len(found) < count:
        tokens = ids.shape[1]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, seen + tokens), np.int64),
            "position_ids": np.arange(seen, seen + tokens)[None],
            **past,
        }
        start = time.perf_counter()
        result = dict(zip(outputs, running.run(None, feed), strict=True))
        spent.append(time.perf_counter() - start)
        past = {n: result[n.replace("past_key_values", "present")] for n in past}
        seen += tokens
        found.append(int(result["logits"][0, -1].argmax()))
        ids = np.array([[found[-1]]])
    return found, spent


def compare(model: SparseModel, graph: fx.GraphModule, path: Path) -> tuple[Case, ...]:
    """Every case of :func:`cases` on the file and in eager; see :class:`Trials`."""
    return Trials(model, graph).compared(path)


class Trials:
    """What a model and files made of it give on the cases of :func:`cases`.

    Args:
        graph: of :func:`sparsify.codegen.onnx.trace.formed`, what the files were traced from.

    Attributes:
        cases: name and flat inputs; eager: the model's own outputs, case by case.
    """

    def __init__(self, model: SparseModel, graph: fx.GraphModule) -> None:
        self.model, self.graph, self.cases = model, graph, cases(model)
        self._own: list[selections.Masks] = []
        with torch.no_grad():
            self.eager = [counted(model, flat, model.graph(*flat)) for _, flat in self.cases]

    def outputs_of(self, path: Path, *, float32: bool = False) -> list[Outputs]:
        """A file's outputs, case by case; see :func:`session`."""
        model, running = self.model, session(path, float32=float32)
        names = input_names(model.call_spec)
        return [counted(model, flat, run(running, names, flat)) for _, flat in self.cases]

    def compared(self, path: Path) -> tuple[Case, ...]:
        """A file beside the model: outputs and selections."""
        return self.with_selections(self.between(self.outputs_of(path), self.eager), path)

    def with_selections(
        self, found: Sequence[Case], path: Path, *, float32: bool = False
    ) -> tuple[Case, ...]:
        """The cases with how the file's selections agree with those of the forms in torch."""
        if not any(self._selected()):
            return tuple(found)
        running = session(path, float32=float32, watched=True)
        files = [value.name for value in running.get_outputs()]
        names, made = input_names(self.model.call_spec), []
        for case, (_, flat), own in zip(found, self.cases, self._selected(), strict=True):
            given = dict(zip(files, run(running, names, flat), strict=True))
            agreed = self._agreed(flat, own, given, judged=case.held)
            made.append(dataclasses.replace(case, selection=agreed))
        return tuple(made)

    def _selected(self) -> list[selections.Masks]:
        """Of the forms in torch, case by case."""
        if not self._own:
            for _, flat in self.cases:
                with torch.no_grad(), selections.recorded(self.graph) as own:
                    self.graph.forward(*flat)
                self._own.append(own.masks)
        return self._own

    def _agreed(
        self,
        flat: Sequence[Tensor],
        own: selections.Masks,
        given: selections.Masks,
        *,
        judged: bool,
    ) -> Agreement | None:
        """``given``: all outputs of a watched session, by name, the file's own first."""

        def real(mask: Tensor) -> Tensor:
            return without_padding(self.model, flat, mask)

        both = [(real(mask), real(given[name])) for name, mask in own.items() if name in given]
        decisions = sum(mine.numel() for mine, _ in both)
        differ = sum(int((mine != files).sum()) for mine, files in both)
        if not differ or not judged:
            return Agreement(decisions, differ) if decisions else None
        with torch.no_grad(), selections.recorded(self.graph, given, real, RELATIVE) as again:
            mine = counted(self.model, flat, self.graph.forward(*flat))
        files = counted(self.model, flat, list(given.values())[: len(mine)])
        error, scale = _worst(files, mine)
        return Agreement(decisions, differ, tuple(again.untied), relative(error, scale))

    def between(
        self,
        found: Sequence[Outputs],
        expected: Sequence[Outputs],
        against: str = "model",
        *,
        held: bool = True,
    ) -> tuple[Case, ...]:
        """One case for each of :attr:`cases`."""
        made = []
        for (name, _), mine, others in zip(self.cases, found, expected, strict=True):
            error, scale = _worst(mine, others)
            same = None
            if isinstance(self.model.call_spec, CausalCall) and others[0].numel():
                same = float((mine[0].argmax(-1) == others[0].argmax(-1)).double().mean())
            made.append(Case(name, error, scale, same, against=against, held=held))
        return tuple(made)


def _worst(found: Outputs, expected: Outputs) -> tuple[float, float]:
    """(largest absolute difference, largest absolute value) of the output that is the most off."""
    pairs = [error_between(a, b) for a, b in zip(found, expected, strict=True)]
    return max(pairs, key=lambda pair: relative(*pair))


def run(running: Any, names: Sequence[str], flat: Sequence[Tensor]) -> list[Tensor]:
    """The session's outputs on flat inputs; those that the file does not read are left out."""
    return [torch.from_numpy(found) for found in running.run(None, feed(running, names, flat))]


def feed(running: Any, names: Sequence[str], flat: Sequence[Tensor]) -> dict[str, Any]:
    """Inputs by name."""
    known = {value.name for value in running.get_inputs()}
    return {
        name: tensor.detach().cpu().contiguous().numpy()
        for name, tensor in zip(names, flat, strict=True)
        if name in known
    }
