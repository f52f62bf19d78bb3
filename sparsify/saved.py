"""Verbs on saved models: load, verify, diff, generate."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify import hf
from sparsify.core import BOUNDED, REORDERED
from sparsify.errors import BadInput
from sparsify.evidence import check_end_to_end
from sparsify.findings import Generation, Verification
from sparsify.models_hf import tokenizer_of
from sparsify.report import Report
from sparsify.report_diff import ReportDiff
from sparsify.report_diff import diff as diff_reports
from sparsify.runtime.checkpoint import REPORT, load_folder
from sparsify.runtime.ffn import RoutedFFN
from sparsify.runtime.model import SparseModel
from sparsify.runtime.spec import RoutedModule


def load(path: str | Path) -> SparseModel:
    """A saved sparse model, of its transformers class where transformers is installed.

    Raises:
        BadCheckpoint: damaged, incomplete, of an unknown version, or no sparse model at all.
    """
    model = load_folder(path)
    if isinstance(model.report, dict):
        model.report = Report.from_dict(model.report)
    loaded = hf.attach(model, path)
    loaded.tokenizer, notes = tokenizer_of(Path(path))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return loaded


def verify(path: str | Path | SparseModel) -> Verification:
    """Run a model at its dense limit on its stored example, against the dense outputs.

    Where an approximation was asked for, it must be no worse than when it was made.
    """
    model = path if isinstance(path, SparseModel) else load_folder(path)
    if not model.golden:
        raise BadInput("the model has no stored example to verify with", where=str(path))
    claims = [(REORDERED, length_of(m)) for m in model.modules() if isinstance(m, RoutedModule)]
    claims = claims or [(REORDERED, 1)]
    report = model.report
    report = Report.from_dict(report) if isinstance(report, dict) else report
    if isinstance(report, Report) and (known := _known_error(report)):
        claims.append((BOUNDED(known), 1))
    evidence = check_end_to_end(model.graph, model.example, model.golden, claims)
    name = model.pipeline if isinstance(path, SparseModel) else str(path)
    return Verification(name, (evidence,))


def _known_error(report: Report) -> float:
    """Relative error of the outputs where a pass was asked to approximate; 0 where none was."""
    found = [e for step in report.steps for e in step.evidence if e.scope == "end-to-end"]
    last = found[-1] if found else None
    if last is None or "APPROXIMATE" not in last.claim:
        return 0.0
    return last.error / max(last.scale, 1e-30)


def length_of(module: nn.Module) -> int:
    """Roundings on the path through a routed module: the lengths of its sums."""
    if isinstance(module, RoutedFFN):
        units = 1 if module.copies else module.experts
        return module.width + units * module.hidden
    weight = getattr(module, "weight", None)
    return int(weight.shape[-1]) if isinstance(weight, torch.Tensor) else 64


def diff(a: str | Path, b: str | Path) -> ReportDiff:
    """Two saved models (or report files) side by side."""
    return diff_reports(_report(a), _report(b), (str(a), str(b)))


def _report(path: str | Path) -> Report:
    file = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BadInput(
            f"no report in {path}",
            why=f"{file}: {reason}",
            help="diff takes a folder that sparsify compile wrote, or a report's JSON file",
        ) from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{file} is not JSON", why=str(error)) from None
    except BadInput as error:  # it does not know the file
        raise BadInput(f"no report in {file}", why=error.what, help=error.help) from None


def generate(
    model: str | Path | SparseModel,
    prompt: str,
    *,
    tokens: int = 40,
    active: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    lower: bool = True,
) -> Generation:
    """Continue ``prompt`` with a saved language model.

    Args:
        lower: put kernels into the model first (:meth:`SparseModel.lower`), unless it has some.

    Raises:
        BadInput: the model has no tokenizer or does not generate.
    """
    sparse = model if isinstance(model, SparseModel) else load(model)
    if sparse.tokenizer is None:
        raise BadInput("the model was saved without a tokenizer", help="compile with tokenizer=...")
    if active is not None:
        sparse.set_active(active)
    ids = sparse.tokenizer(prompt, return_tensors="pt")
    if ids["input_ids"].shape[1] == 0:
        raise BadInput("the prompt is empty")
    if lower and not any(m.kernel for m in sparse.modules() if isinstance(m, RoutedModule)):
        sparse.lower()
    torch.manual_seed(seed)
    sparse.reset_counters()
    start = time.perf_counter()
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    with torch.no_grad():
        found = sparse.generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=tokens, **options
        )
    seconds = time.perf_counter() - start
    new = found[0][ids["input_ids"].shape[1] :]
    live = sparse.realised()
    return Generation(
        prompt,
        sparse.tokenizer.decode(new, skip_special_tokens=True),
        len(new),
        budget(sparse),
        seconds,
        sum(live.values()) / len(live) if live else None,
    )


def budget(model: SparseModel) -> float:
    """The mean budget of the model's routers; 1 where it has none."""
    return sum(model.active.values()) / len(model.active) if model.active else 1.0
