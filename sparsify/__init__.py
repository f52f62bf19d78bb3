"""sparsify: a compiler from pretrained dense models to routed sparse ones that skip the work.

Names load on first use, so ``import sparsify`` costs milliseconds and no torch. The distribution is
called ``sparsify-fx``; :class:`ForeignPackage` is raised where another one owns this import name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsify.owner import check_owner

check_owner()

if TYPE_CHECKING:
    from sparsify.api import (
        bisect,
        compile,  # noqa: A004
        diff,
        generate,
        inspect,
        load,
        reproduce,
        verify,
    )
    from sparsify.core import (
        APPROXIMATE,
        BOUNDED,
        EXACT,
        REORDERED,
        Claim,
        Moved,
        Pass,
        Refused,
        Remark,
        Rewrite,
        Splice,
        option,
    )
    from sparsify.errors import SparsifyError
    from sparsify.healing import heal
    from sparsify.regions import (
        Attention,
        FeedForward,
        Layer,
        Projection,
        Region,
        Stack,
    )
    from sparsify.report import Report
    from sparsify.runtime.model import SparseModel
    from sparsify.searching import search

__version__ = "0.1.0"

# sparsify.api.evaluate is not among them: the import of the module sparsify.evaluate would take the
# function's place.
_HOME = {
    "sparsify.api": (
        "bisect", "compile", "diff", "generate", "inspect", "load", "reproduce", "verify",
    ),
    "sparsify.core": (
        "APPROXIMATE", "BOUNDED", "EXACT", "REORDERED", "Claim", "Moved", "Pass", "Refused",
        "Remark", "Rewrite", "Splice", "option",
    ),
    "sparsify.errors": ("SparsifyError",),
    "sparsify.healing": ("heal",),
    "sparsify.regions": ("Attention", "FeedForward", "Layer", "Projection", "Region", "Stack"),
    "sparsify.report": ("Report",),
    "sparsify.runtime.model": ("SparseModel",),
    "sparsify.searching": ("search",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "APPROXIMATE",
    "BOUNDED",
    "EXACT",
    "REORDERED",
    "Attention",
    "Claim",
    "FeedForward",
    "Layer",
    "Moved",
    "Pass",
    "Projection",
    "Refused",
    "Region",
    "Remark",
    "Report",
    "Rewrite",
    "SparseModel",
    "SparsifyError",
    "Splice",
    "Stack",
    "bisect",
    "compile",
    "diff",
    "generate",
    "heal",
    "inspect",
    "load",
    "option",
    "reproduce",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sparsify' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
