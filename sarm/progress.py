"""Progress bars on stderr, so that results on stdout stay clean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

stderr = Console(stderr=True, highlight=False, markup=False)


class Bar:
    """One task of a progress display."""

    def __init__(self, progress: Progress, task) -> None:
        self._progress, self._task = progress, task

    def to(self, done: float, total: float | None = None) -> None:
        """Set how much is done, and perhaps of how much."""
        self._progress.update(self._task, completed=done, total=total)

    def advance(self, by: float) -> None:
        """Add to what is done."""
        self._progress.advance(self._task, by)

    def note(self, text: str) -> None:
        """A short text behind the bar, e.g. the loss."""
        self._progress.update(self._task, note=text)


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int | None], Bar]]:
    """Yields a function that adds a bar, shown on a terminal: `bar = add("scoring", total)`."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        disable=not stderr.is_terminal,  # a log or a pipe gets messages only
    )

    def add(title: str, total: int | None = None) -> Bar:
        return Bar(progress, progress.add_task(title, total=total, note=""))

    with progress:
        yield add
