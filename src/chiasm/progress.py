"""Progress of long work: a small protocol that library functions call and the command line draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress as _RichBar
    from rich.progress import TaskID


class Progress(Protocol):
    """What long functions accept; every method may be called from one thread only."""

    def start(self, total: int | None, description: str) -> None:
        """Begin a stage of ``total`` units (None: unknown)."""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Report ``n`` more units done; ``fields`` are shown beside the bar (``loss=0.31``)."""

    def finish(self) -> None:
        """End the stage."""


class SilentProgress:
    """Does nothing; the default of library functions."""

    def start(self, total: int | None, description: str) -> None:
        """Ignore."""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


class RichProgress:
    """Draws a bar with rate and time left on standard error; use as a context manager.

    Args:
        unit: What is counted; empty: the last word of what each stage is called (``embedding images``: images/s).
    """

    def __init__(self, *, unit: str = "it") -> None:
        self.unit = unit
        self._counted = unit
        self._bar: _RichBar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finish()

    def start(self, total: int | None, description: str) -> None:
        """Open a bar; an open one is closed first."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.finish()
        self._counted = self.unit or description.rpartition(" ")[2]
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task(description, total=total, note="", rate="")

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Move the bar and show the fields."""
        if self._bar is None or self._task is None:
            return
        note = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        self._bar.advance(self._task, n)
        speed = self._bar.tasks[0].speed
        rate = f"{speed:.1f} {self._counted}/s" if speed else ""
        self._bar.update(self._task, note=note, rate=rate) if note else self._bar.update(self._task, rate=rate)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
