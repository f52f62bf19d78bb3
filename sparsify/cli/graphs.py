"""``--print-after`` and ``--emit-graph``: the graph as it is after each pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.cli import show


def watcher(print_after: str | None, folder: Path | None) -> Callable[[Any, Any], None] | None:
    """A callback for ``compile(on_step=...)``, or None where nothing is wanted.

    Args:
        print_after: ``change`` prints to stderr after a pass that rewrote something, ``all`` after
            every pass.
        folder: gets one file for each pass, ``01-ffn-moe.py``.
    """
    if print_after is None and folder is None:
        return None
    count = 0

    def after(step: Any, state: Any) -> None:
        nonlocal count
        count += 1
        changed = step.count("applied")
        text = (
            f"# after {step.options}: {step.nodes_before} -> {step.nodes_after} operations, "
            f"{changed} region{'s' * (changed != 1)} rewritten\n{state.gm.code.strip()}\n"
        )
        if print_after == "all" or (print_after == "change" and changed):
            print(text, file=sys.stderr)
        if folder is not None:
            show.emit(text, folder / f"{count:02}-{step.pass_name}.py")

    return after
