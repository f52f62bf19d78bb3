"""The scripts' door: makes sure that ``sparsify`` is this project before anything of it runs.

Another distribution installs an import package ``sparsify`` too (see sparsify/owner.py). Where its
files win, none of ours would run to say so; a module of another name can.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_MARK = "sparsify-fx"  # stands in our sparsify/__init__.py and in no other


def _foreign_file() -> str | None:
    """The file that ``import sparsify`` would run where it is not ours, else None."""
    spec = importlib.util.find_spec("sparsify")
    if spec is None or spec.origin is None:
        return "nothing"
    text = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    return None if _MARK in text else spec.origin


def main() -> int:
    """Run the command line; returns the exit code."""
    if (origin := _foreign_file()) is not None:
        print(
            f"error: the import name 'sparsify' belongs to another package ({origin})\n"
            "  help: pip uninstall -y sparsify eai-sparsify"
            f" && pip install --force-reinstall --no-deps {_MARK}",
            file=sys.stderr,
        )
        return 2
    try:
        from sparsify.cli import main as run
    except Exception as error:
        render = getattr(error, "render", None)  # ForeignPackage; its class may not be importable
        if render is None:
            raise
        print(render(), file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
