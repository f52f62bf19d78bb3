"""Progress of long work on stderr, with the time left; silent unless stderr is a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def bars(*, quiet: bool = False) -> Iterator[Progress | None]:
    """A callback ``(event, done, total)`` that draws one bar per event, or None where none shows.

    A total of 0 means that the length is unknown. The bars vanish at the end: what stays on the
    screen is the result.
    """
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich import console, progress

    screen = console.Console(stderr=True)  # obeys NO_COLOR
    columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}")]
    if screen.width >= 60:
        columns.append(progress.BarColumn(bar_width=min(40, screen.width - 44)))
    columns += [progress.MofNCompleteColumn(), progress.TimeRemainingColumn(compact=True)]
    # on a terminal, what is printed meanwhile goes above the bars; in a pipe it is left alone
    above = sys.stdout.isatty()
    with progress.Progress(
        *columns, console=screen, transient=True, redirect_stdout=above
    ) as drawing:
        tasks: dict[str, progress.TaskID] = {}
        loading: list[progress.TaskID] = [drawing.add_task("loading", total=None)]

        def report(event: str, done: int, total: int) -> None:
            while loading:  # torch and the model are there: the first real event says so
                drawing.remove_task(loading.pop())
            if event not in tasks:
                tasks[event] = drawing.add_task(event, total=total or None)
            drawing.update(tasks[event], completed=done, total=total or None)
            drawing.refresh() if done == total else None

        yield report
