"""All contract tests of one model run on one worker and together; it is captured once.

Architectures whose structure another one has as well (how layers are spelled differs) run all
passes in ``make test-all``; ``make test`` checks only that their regions are found and what needs
no pass of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import zoo_captures

TWINS = frozenset(
    "llama-eager mistral qwen2 gemma3 phi dinov2 gpt-neox transformer-encoder-prenorm".split()
)
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests by model; a model's come one after the other without xdist too."""
    places = [at for at, item in enumerate(items) if item.path.parent == HERE]
    groups: dict[str, list[pytest.Item]] = {}
    for item in (items[at] for at in places):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name = params.get("name")
        if name:  # pairs apart: the models that have them would make one worker wait for the other
            part = " pairs" if item.path.stem == "test_pairs" else ""
            item.add_marker(pytest.mark.xdist_group(name + part))
        if name in TWINS and "pipeline" in params:
            item.add_marker(pytest.mark.slow)
        groups.setdefault(_group(item), []).append(item)
    ordered = [item for group in groups.values() for item in group]
    for at, item in zip(places, ordered, strict=True):
        items[at] = item


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Nobody asks for the compiled models of a group after it: a thousand of them fill a heap."""
    if nextitem is None or _group(item) != _group(nextitem):
        zoo_captures.forget()


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else ""
