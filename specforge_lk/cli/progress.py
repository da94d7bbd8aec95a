"""Progress with a rate and the time left: bars on a terminal, lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_T = TypeVar("_T")

#: Seconds between two lines of one bar where output is not a terminal.
LINE_INTERVAL = 20.0
#: Least seconds between two notes.
NOTE_INTERVAL = 5.0


class ProgressBars:
    """Context manager that shows any number of bars.

    Args:
        console: Where to show them; standard error unless given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.display = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def add(self, what: str, total: int | None, unit: str, *, done: int = 0) -> Bar:
        """Add a bar.

        Args:
            what: What is being done, such as ``sampling``.
            total: Amount of work; None if it is not known.
            unit: What is counted: the unit of a rate, such as ``tok/s``, beside the share of the
                work; or a noun, such as ``steps``, beside how many of them are done.
            done: Work that was done before.
        """
        return Bar(self, what, total, unit, done)

    def print(self, text: str, style: str = "") -> None:
        """Print a line above the bars."""
        self.console.print(Text(text, style), soft_wrap=True)

    def __enter__(self) -> Self:
        self.display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.display.stop()


class Bar:
    """One bar of `ProgressBars`, which counts work towards a total and items for a rate."""

    def __init__(
        self, bars: ProgressBars, what: str, total: int | None, unit: str, done: int = 0
    ) -> None:
        self._bars, self._what, self._total, self._unit = bars, what, total, unit
        self._done = self._done_before = done
        self._items = 0
        self._start = self._last_line = time.monotonic()
        self._task = bars.display.add_task(
            what, total=total, completed=done, status=self._status(0)
        )

    def advance(self, items: int, work: int) -> None:
        """Count ``items`` for the rate and ``work`` towards the total."""
        self._items += items
        self.reach(self._done + work)

    def reach(self, done: int) -> None:
        """Say how much of the total is done."""
        self._done = done
        elapsed = time.monotonic() - self._start
        status = self._status(elapsed)
        self._bars.display.update(self._task, completed=done, status=status)
        now = time.monotonic()
        if self._bars.console.is_terminal or now - self._last_line <= LINE_INTERVAL:
            return
        self._last_line = now
        line = f"{self._what} {status}, {elapsed:.0f} s"
        if self._total is not None:
            left = elapsed * (self._total - done) / max(done - self._done_before, 1)
            line += f", about {left:.0f} s left"
        self._bars.print(line)

    def name(self, what: str) -> None:
        """Show what is under way now, in a line of its own where there is no terminal."""
        self._bars.display.update(self._task, description=what)
        if not self._bars.console.is_terminal:
            self._bars.print(f"{what} ({self._status(0)} done)")

    def _status(self, elapsed: float) -> str:
        if not self._unit.endswith("/s"):
            return f"{self._done}/{self._total} {self._unit}"
        if self._total is None:
            share = str(self._done)
        else:
            share = f"{self._done / max(self._total, 1):.0%}"
        return f"{share}, {self._items / max(elapsed, 1e-9):.0f} {self._unit}"


class ProgressBar(Bar):
    """Context manager of a single bar; see `ProgressBars.add` for its arguments."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        super().__init__(ProgressBars(), what, total, unit)
        self._last_note = float("-inf")

    def note(self, text: str) -> None:
        """Print a line above the bar, at most one in `NOTE_INTERVAL` seconds."""
        if time.monotonic() - self._last_note > NOTE_INTERVAL:
            self._last_note = time.monotonic()
            self.print(text)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._bars.print(text, "yellow")

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.__exit__(kind, error, trace)


def each(
    what: str, items: Sequence[_T], console: Console | None = None, *, unit: str = "cells"
) -> Iterator[_T]:
    """Yield the items one after the other, naming the one that is under way."""
    with ProgressBars(console) as bars:
        bar = bars.add(what, len(items), unit)
        for item in items:
            bar.name(f"{what}: {item}")
            yield item
            bar.advance(1, 1)


__all__ = ["Bar", "ProgressBar", "ProgressBars", "each"]
