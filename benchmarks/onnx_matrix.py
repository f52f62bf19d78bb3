"""Which pass on which zoo model exports as portable ONNX, and how far the file is from eager.

``python benchmarks/onnx_matrix.py [--models llama,vit] [--passes ffn-moe]`` compiles, turns half of
the units off, exports, and runs the file in ONNX Runtime on every case of
:mod:`sparsify.codegen.onnx.parity` (example, prefill, batch, left padding, decode). Cells that are
in benchmarks/results/onnx.json already are kept; ``--again`` measures them anew. Writes that file
and, from it, benchmarks/results/ONNX.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "onnx.json"
TABLE = RESULTS.with_name("ONNX.md")
ACTIVE = 0.5
HEAD = """# Portable ONNX: every pass on every model of the zoo

Half of the units active. Numbers: the largest error of any output in any case (example, one
sample; language models: prefill, a batch, left padding, decoding with a cache), ONNX Runtime
against eager, relative to the output's scale, float32; allowed is 1e-4. `–`: the pass refuses every
region of the model, as `sparsify compile` says; why, see below. Empty: not measured. Made by
`python benchmarks/onnx_matrix.py`.
"""


def main() -> None:
    from sparsify import registry, zoo

    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--models", default=",".join(zoo.names()))
    asked.add_argument("--passes", default=",".join(registry.names()))
    asked.add_argument("--again", action="store_true")
    given = asked.parse_args()
    cells: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in given.models.split(","):
        captured = None
        for work in given.passes.split(","):
            key = f"{name} {work}"
            if key in cells and not given.again:
                continue
            captured = captured or _captured(name)
            cells[key] = cell(captured, work)
            print(key, cells[key], flush=True)
            RESULTS.write_text(json.dumps(dict(sorted(cells.items())), indent=1) + "\n")
    TABLE.write_text(table(cells))


def _captured(name: str) -> Any:
    from sparsify import zoo
    from sparsify.capture import capture

    made = zoo.build(name)
    return capture(made.model, made.example)


def cell(captured: Any, work: str) -> dict[str, Any]:
    """One pass on one captured model: ``error``, ``left`` or ``refused``."""
    import sparsify
    from sparsify.errors import BadInput, NothingMatched, SparsifyError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = sparsify.compile(captured, work, verify="off", reproducer=None)
        except NothingMatched as error:
            return {"left": error.what}
        (step,) = model.report.steps
        if not step.count("applied"):
            return {"left": step.remarks[0].reason}
        try:
            model.set_active(ACTIVE)
        except BadInput as error:
            return {"left": error.what}
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = model.export(Path(folder) / "model.onnx")
            except SparsifyError as error:
                return {"refused": f"{error.what}: {error.why}"}
    worst = max(case.relative for case in found.cases)
    agreed = [case.selection for case in found.cases if case.selection is not None]
    return {
        "error": float(f"{worst:.1e}"),
        "cases": len(found.cases),
        "selections": sum(a.decisions for a in agreed),
        "differ": sum(a.differ for a in agreed),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(cells: dict[str, Any]) -> str:
    """The Markdown page."""
    keys = [key.split(" ") for key in cells]
    models = sorted({name for name, _ in keys})
    works = sorted({work for _, work in keys})
    lines = [
        HEAD,
        selected(cells),
        "",
        "| pass | " + " | ".join(models) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    refused = []
    for work in works:
        row = []
        for name in models:
            found = cells.get(f"{name} {work}", {})
            if "refused" in found:
                refused.append(f"* `{work}` on {name}: {found['refused']}")
            row.append(
                f"{found['error']:.0e}" if "error" in found
                else "–" if "left" in found else f"[{len(refused)}]" if found else ""
            )  # fmt: skip
        lines.append(f"| `{work}` | " + " | ".join(row) + " |")
    if refused:
        lines += ["", "Refused:", "", *refused]
    return "\n".join([*lines, "", "Left dense by the pass:", "", *left(cells)]) + "\n"


def selected(cells: dict[str, Any]) -> str:
    """How the files' selections agree with eager's."""
    compared = [found for found in cells.values() if "selections" in found]
    routed = {key: found for key, found in cells.items() if found.get("selections")}
    total = sum(found["selections"] for found in routed.values())
    differ = {key: found["differ"] for key, found in routed.items() if found["differ"]}
    said = "all as in eager"
    if differ:
        said = "as in eager but for " + ", ".join(f"{n} of {key}" for key, n in differ.items())
    return (
        f"Selections were compared in {len(compared)} files, {len(routed)} of which select per"
        f" token (the choice of others is fixed at this budget): {total:,} selections, each a unit"
        f" live or not for a token, {said}."
    )


def left(cells: dict[str, Any]) -> list[str]:
    """A line per pass and reason."""
    by: dict[tuple[str, str], list[str]] = {}
    for key, found in sorted(cells.items()):
        name, work = key.split(" ")
        if "left" in found:
            by.setdefault((work, found["left"]), []).append(name)
    return [f"* `{work}`: {why} ({', '.join(names)})" for (work, why), names in sorted(by.items())]


if __name__ == "__main__":
    main()
