"""All contract tests of one model run on one worker and together (tests/groups.py).

Architectures whose structure another one has as well (how layers are spelled differs) run all
passes in ``make test-all``; ``make test`` checks only that their regions are found and what needs
no pass of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import zoo_captures
from tests.groups import group_of

TWINS = frozenset(
    "llama-eager mistral qwen2 gemma3 phi dinov2 gpt-neox transformer-encoder-prenorm".split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the passes on twins as slow."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        own = item.path.parent == Path(__file__).parent
        if own and params.get("name") in TWINS and "pipeline" in params:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Nobody asks for the compiled models of a group after it: a thousand of them fill a heap."""
    if nextitem is None or group_of(item.nodeid) != group_of(nextitem.nodeid):
        zoo_captures.forget()
