"""Whether the file computes what the model computes: ONNX Runtime against eager, case by case."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.codegen.onnx.custom.files import beside
from sparsify.codegen.onnx.names import input_names
from sparsify.codegen.onnx.needs import need
from sparsify.evidence import error_between
from sparsify.runtime.calling import CausalCall
from sparsify.runtime.model import SparseModel

RELATIVE = 1e-4  # of the largest output, in float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: example, prefill, decode, ...
        error: largest absolute difference of any output; scale: largest absolute value of that one.
        same: share of positions whose likeliest token is the same (causal models), else None.
        against: what the file is held against, where that is not the model itself; held: whether
            :data:`RELATIVE` is asked of it, or it is told only (what rounded weights cost).
    """

    name: str
    error: float
    scale: float
    same: float | None = None
    against: str = "model"
    held: bool = True

    @property
    def relative(self) -> float:
        """Of the output's scale."""
        return self.error / max(self.scale, 1e-30)

    @property
    def ok(self) -> bool:
        """Within :data:`RELATIVE`, where that is asked."""
        return not self.held or self.relative <= RELATIVE

    def text(self) -> str:
        """One line."""
        agree = "" if self.same is None else f", same token {self.same:.1%}"
        word = ("ok " if self.ok else "BAD") if self.held else "   "
        beside = "" if self.against == "model" else f" ({self.against})"
        return f"{word} {self.name:<13} relative error {self.relative:.1e}{agree}{beside}"


def session(path: Path, *, threads: int = 1, float32: bool = False, spin: bool = True) -> Any:
    """An ONNX Runtime session on the CPU, with the file's own operators where it has some.

    Args:
        float32: products with weights in 4 or 8 bits are computed in float32; without it ONNX
            Runtime rounds their inputs to 8 bits, which is faster.
        spin: its threads wait for work awake, a while, as they do by default; sessions that take
            turns would take cores from each other so.
    """
    (ort,) = need("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if float32:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    library, _ = beside(path)
    if library.exists():
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


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


Outputs = list[Tensor]


def compare(model: SparseModel, path: Path) -> tuple[Case, ...]:
    """Every case of :func:`cases` on the file and in eager."""
    trials = Trials(model)
    return trials.between(trials.outputs_of(path), trials.eager)


class Trials:
    """What a model and files made of it give on the cases of :func:`cases`.

    Attributes:
        cases: name and flat inputs; eager: the model's own outputs, case by case.
    """

    def __init__(self, model: SparseModel) -> None:
        self.model, self.cases = model, cases(model)
        with torch.no_grad():
            self.eager = [counted(model, flat, model.graph(*flat)) for _, flat in self.cases]

    def outputs_of(self, path: Path, *, float32: bool = False) -> list[Outputs]:
        """A file's outputs, case by case; see :func:`session`."""
        model, running = self.model, session(path, float32=float32)
        names = input_names(model.call_spec)
        return [counted(model, flat, run(running, names, flat)) for _, flat in self.cases]

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
            pairs = [error_between(a, b) for a, b in zip(mine, others, strict=True)]
            error, scale = max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))
            same = None
            if isinstance(self.model.call_spec, CausalCall) and others[0].numel():
                same = float((mine[0].argmax(-1) == others[0].argmax(-1)).double().mean())
            made.append(Case(name, error, scale, same, against, held))
        return tuple(made)


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


def counted(model: SparseModel, flat: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs without what nobody reads: a language model's at padding.

    A query at padding sees no key, and what attention gives then is each implementation's own.
    """
    call = model.call_spec
    if not isinstance(call, CausalCall) or not call.masked:
        return list(outputs)
    real = flat[1].bool()
    logits, *cache = outputs
    tokens = real[:, real.shape[1] - logits.shape[1] :]
    return [logits[tokens], *(entry.movedim(2, 1)[real] for entry in cache)]


def cases(model: SparseModel) -> list[tuple[str, list[Tensor]]]:
    """(name, flat inputs): the example, and other sizes where the graph is open."""
    call = model.call_spec
    found = [("example", list(model.example))]
    free = bool(call.slots) and all(size is None for size in call.slots[0].shape)
    if not isinstance(call, CausalCall):
        batch = model.example[0].shape[0] if model.example and model.example[0].dim() else 0
        open_batch = [bool(s.shape) and s.shape[0] is None for s in call.slots]
        same = [t.dim() > 0 and t.shape[0] == batch for t in model.example]
        if batch > 1 and open_batch and all(o == s for o, s in zip(open_batch, same, strict=True)):
            found.append(("one sample", [t[:1] for t in model.example]))
        return found
    if not free:
        return found
    ids = _ids(call, batch=3, tokens=9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    dtype = model.dtype
    found.append(("prefill", call.inputs(ids[:1], dtype=dtype)))
    found.append(("batch", call.inputs(ids, dtype=dtype)))
    if call.masked:
        found.append(("left padding", call.inputs(ids, mask, dtype=dtype)))
    if call.layers:
        with torch.no_grad():
            _, *cache = model.graph(*call.inputs(ids, mask if call.masked else None, dtype=dtype))
        past = list(zip(cache[::2], cache[1::2], strict=True))
        longer = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1) if call.masked else None
        found.append(("decode", call.inputs(ids[:, :1], longer, None, past)))
    return found


def _ids(call: CausalCall, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, max(call.vocabulary - 1, 4), (batch, tokens), generator=generator)
