"""Who owns the import name ``sparsify``: other distributions on the package index claim it too.

``sparsify`` and ``eai-sparsify`` both install a package and a script of this name over ours. The
check lists folder names (about a millisecond) and reads a file only where a name looks foreign.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from sparsify.errors import ForeignPackage

OURS = "sparsify-fx"
_CLAIM = "sparsify/__init__.py,"


def check_owner(folders: Iterable[str] | None = None) -> None:
    """Raise :class:`ForeignPackage` where an installed distribution other than ours owns the name.

    Args:
        folders: where distributions are installed; ``sys.path`` by default.
    """
    for folder in dict.fromkeys(sys.path if folders is None else folders):
        for found in Path(folder or ".").glob("*sparsify*.dist-info"):
            distribution = found.stem.rsplit("-", 1)[0].replace("_", "-")
            if distribution != OURS and _claims(found / "RECORD"):
                raise foreign(distribution, folder)


def foreign(distribution: str, folder: str) -> ForeignPackage:
    """The error that names the other owner and the way out."""
    return ForeignPackage(
        f"the import name 'sparsify' belongs to another installed package, {distribution}",
        where=f"--> {folder}",
        help=f"pip uninstall -y {distribution} && pip install --force-reinstall --no-deps {OURS}",
    )


def _claims(record: Path) -> bool:
    try:
        with record.open(encoding="utf-8", errors="replace") as lines:
            return any(line.startswith(_CLAIM) for line in lines)
    except OSError:
        return False
