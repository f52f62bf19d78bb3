"""Which tests run one after the other on one worker, because they share what takes long to make.

A module's tests share its models, the contract tests of one zoo model its capture, and its compiled
models. xdist 3.8's own groups do nothing with pytest 9.2: its ``xdist_group`` mark is written to
``item._nodeid``, which that pytest does not read (every test was a group of its own, and both
workers captured every model). It would also run groups of few tests last, whatever they take.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from sparsify import zoo


@functools.cache
def group_of(nodeid: str) -> str:
    """The group of a test, from its node id alone: the scheduler knows no more of it.

    The README's tests are apart. So are pairs of passes from the other contract tests of a model:
    one worker would wait for the other at the end of them.
    """
    path, _, test = nodeid.partition("::")
    folder, _, module = path.rpartition("/")
    if folder.endswith("docs"):
        return nodeid
    if folder.endswith("onnx"):
        return folder  # one model, compiled and translated once
    if not folder.endswith("contract"):
        return path
    parameters = test.partition("[")[2].rstrip("]")
    held = [n for n in zoo.names() if re.search(rf"(^|-){re.escape(n)}(-|$)", parameters)]
    return f"{module} {max(held, key=len, default='llama')}"


def scheduler(config: Any, log: Any) -> Any:
    """xdist's scheduler by scope, over these groups, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Grouped(config, log)
