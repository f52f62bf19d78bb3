"""All that a converted model needs to run: torch and this package, nothing else.

Importing it loads no torch: names load with their module on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

# name -> module of this package
_HOME = {
    "Cost": "cost",
    "Counter": "counters",
    "Program": "program",
    "Ref": "program",
    "RoutedAttend": "attend",
    "RoutedColumns": "heads",
    "RoutedFFN": "ffn",
    "RoutedModule": "spec",
    "RoutedRows": "heads",
    "Router": "router",
    "Step": "program",
    "from_spec": "spec",
    "realised": "counters",
    "routed": "spec",
    "set_active": "dial",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
