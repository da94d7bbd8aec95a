"""A progress bar with a rate and the time left; lines of text where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

#: Seconds between two lines where output is not a terminal.
LINE_INTERVAL = 20.0
#: Least seconds between two notes.
NOTE_INTERVAL = 5.0


class ProgressBar:
    """Context manager that counts two things: work towards a total, and items for the rate.

    Args:
        what: What is being done, such as ``sampling``.
        total: Amount of work; None if it is not known.
        unit: Unit of the rate, such as ``tok/s``.
    """

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        console = Console(stderr=True)
        self._what, self._total, self._unit = what, total, unit
        self._items = self._done = 0
        self._start = self._last_line = time.monotonic()
        self._last_note = float("-inf")
        self._plain = None if console.is_terminal else console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[share]} {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=self._plain is not None,
        )
        self._task = self._progress.add_task(what, total=total, share="", rate="")

    def advance(self, items: int, work: int) -> None:
        """Count ``items`` for the rate and ``work`` towards the total."""
        self._items += items
        self._done += work
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = f"{self._items / elapsed:.0f} {self._unit}"
        share = (
            str(self._done) if self._total is None else f"{self._done / max(self._total, 1):4.0%}"
        )
        self._progress.update(self._task, advance=work, share=share, rate=rate)
        if self._plain and time.monotonic() - self._last_line > LINE_INTERVAL:
            self._last_line = time.monotonic()
            line = f"{self._what} {share.strip()}, {rate}, {elapsed:.0f} s"
            if self._total is not None:
                left = elapsed * (self._total - self._done) / max(self._done, 1)
                line += f", about {left:.0f} s left"
            self._plain.print(line, highlight=False)

    def note(self, text: str) -> None:
        """Print a line above the bar, at most one in `NOTE_INTERVAL` seconds."""
        if time.monotonic() - self._last_note > NOTE_INTERVAL:
            self._last_note = time.monotonic()
            self.print(text)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(text, "yellow"), soft_wrap=True)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


__all__ = ["ProgressBar"]
