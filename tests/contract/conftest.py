"""All contract tests of one model run on one worker, which captures it once."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one model run on one worker, which captures it once."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name:
            item.add_marker(pytest.mark.xdist_group(name))
