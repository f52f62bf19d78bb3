"""Golden texts: ``golden("cli/env.txt", text)`` compares, ``pytest --accept`` writes.

Works under xdist: the option reaches the workers, and every test writes its own files under a
temporary name first.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.groups import group_of, scheduler

# Workers and the commands that tests start share the cores: two busy torch thread pools on two
# cores wait for each other at every small operation (33 minutes instead of 4). Before any torch.
for _pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_pool, "1")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
BENCHMARKS = GOLDEN.parent / "benchmarks"
_SHOWN = 80  # lines of a diff


# Graphs are many small objects: the usual threshold (700) asks for far too many collections.
gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadgroup``, the groups of groups.py."""
    return scheduler(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups stay together without xdist too; what takes longest alone comes first."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in sorted(items, key=lambda item: item.path.parent.name != "docs"):
        groups.setdefault(group_of(item.nodeid), []).append(item)
    items[:] = [item for group in groups.values() for item in group]


def pytest_collection_finish() -> None:
    """What importing made is there to stay."""
    _settle()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a group's caches keep is there to stay."""
    if nextitem is None or group_of(item.nodeid) != group_of(nextitem.nodeid):
        _settle()


def _settle() -> None:
    """Collect, then let no collection look at what is left: full ones would take a second each,
    with the captured models of the zoo in memory, and timing things collects before each round.
    """
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accept", action="store_true", help="write golden texts instead of comparing with them"
    )


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    """Whether this run writes golden texts."""
    return bool(request.config.getoption("--accept"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """``bench(name)``: a script of benchmarks/ as a module, forgotten after the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "quality"))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if BENCHMARKS in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.fixture
def golden(request: pytest.FixtureRequest, accept: bool) -> Callable[[str, str], None]:
    """``golden(path, text)``: the text has to be that of ``golden/<path>``."""

    def check(path: str, text: str) -> None:
        compare(GOLDEN / path, text, accept=accept, test=request.node.nodeid)

    return check


def compare(file: Path, text: str, *, accept: bool, test: str) -> None:
    """Compare ``text`` with ``file``, or write it there; a mismatch fails with a unified diff."""
    text = text.rstrip("\n") + "\n"
    expected = file.read_text(encoding="utf-8") if file.exists() else None
    if text == expected:
        return
    if accept:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
        return
    name = f"golden/{file.relative_to(GOLDEN)}" if file.is_relative_to(GOLDEN) else file.name
    how = f"to accept:  python -m pytest --accept '{test}'"
    if expected is None:
        pytest.fail(f"{name} does not exist\n{how}\n\n{text}", pytrace=False)
    lines = list(
        difflib.unified_diff(
            expected.splitlines(), text.splitlines(), f"{name} (expected)", "found", lineterm=""
        )
    )
    more = [f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
    pytest.fail("\n".join([f"{name} differs", *lines[:_SHOWN], *more, how]), pytrace=False)
