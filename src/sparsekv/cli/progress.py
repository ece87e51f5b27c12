"""A progress bar on stderr: rows done, time left, the task worked on."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """One bar per pass; a context manager. Off a terminal it prints a line at the start of each pass.

    `unit`: what is counted.
    """

    def __init__(self, shown: bool, unit: str = "rows") -> None:
        self._unit = unit
        self._console = Console(stderr=True)
        self._shown = shown
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[doing]}"),
            console=self._console,
            disable=not shown or not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, what: str, total: int, done: int) -> None:
        """A pass begins."""
        self._task = self._bar.add_task(what, total=total, completed=done, doing="")
        if self._shown and not self._console.is_terminal:
            kept = f" ({done} done earlier)" if done else ""
            print(f"{what}: {total} {self._unit}{kept}", file=self._console.file, flush=True)

    def task(self, name: str) -> None:
        """The task that is worked on now."""
        if self._task is not None:
            self._bar.update(self._task, doing=name)

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
        if self._task is not None:
            self._bar.advance(self._task, rows)
