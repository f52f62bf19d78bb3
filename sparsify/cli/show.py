"""What verbs print: tables that fit the terminal, JSON, and files that are never half-written."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import OutputError


def width() -> int:
    """Columns of the terminal; 100 in a pipe; ``COLUMNS`` overrules both."""
    return max(40, shutil.get_terminal_size(fallback=(100, 24)).columns)


def table(rows: Sequence[Sequence[str]], *, columns: int | None = None, indent: str = "") -> str:
    """Rows as aligned columns two blanks apart; the last column wraps to the terminal."""
    if not rows:
        return ""
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lead = sum(sizes) + 2 * len(sizes) + len(indent)
    room = max(20, (columns or width()) - lead)
    lines = []
    for row in rows:
        start = indent + "".join(
            f"{cell:<{size}}  " for cell, size in zip(row, sizes, strict=False)
        )
        first, *rest = textwrap.wrap(row[-1], room) or [""]
        lines.append((start + first).rstrip())
        lines += [" " * lead + line for line in rest]
    return "\n".join(lines)


def report(found: Any) -> None:
    """A compilation's report; in colour on a terminal."""
    if sys.stdout.isatty():
        found.print()  # rich, which heeds NO_COLOR and the terminal's width
    else:
        print(found.text(width=width()))


def as_json(value: Any) -> str:
    """JSON with a trailing newline; NaN and infinities become null, as the standard wants."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def emit(text: str, target: Path | None) -> None:
    """Print ``text``, or write it to a file under a temporary name first."""
    if target is None or str(target) == "-":
        print(text)
        return
    from sparsify.runtime.files import write_text

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {target}", why=error.strerror) from None
