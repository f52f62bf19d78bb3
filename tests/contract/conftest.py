"""All contract tests of one model run on one worker, which captures it once.

Architectures whose structure another one has as well (how layers are spelled differs) run all
passes in ``make test-all``; ``make test`` checks only that their regions are found and what needs
no pass of its own.
"""

from __future__ import annotations

import pytest

TWINS = frozenset(
    "llama-eager mistral qwen2 gemma3 phi dinov2 gpt-neox transformer-encoder-prenorm".split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one model run on one worker, which captures it once."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name = params.get("name")
        if name:  # pairs apart: the models that have them would make one worker wait for the other
            part = " pairs" if item.path.stem == "test_pairs" else ""
            item.add_marker(pytest.mark.xdist_group(name + part))
        if name in TWINS and "pipeline" in params:
            item.add_marker(pytest.mark.slow)
