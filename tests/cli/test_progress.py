"""Progress without a terminal: few lines, and each says how far it is."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from specforge_lk.cli import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=40)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_rate_the_share_and_the_time_left(clock, console):
    with progress.ProgressBars(console) as bars:
        bar = bars.add("sampling", 400, "tok/s")
        clock[0] += 10
        bar.advance(30, 50)
        assert lines(console) == []
        clock[0] += 15
        bar.advance(20, 50)
    assert lines(console) == ["sampling 25%, 2 tok/s, 25 s, about 75 s left"]


def test_several_bars_that_count(clock, console):
    with progress.ProgressBars(console) as bars:
        first, second = bars.add("a", 10, "steps"), bars.add("b", 20, "steps", done=10)
        clock[0] += 30
        first.reach(5)
        second.reach(15)
    assert lines(console) == [
        "a 5/10 steps, 30 s, about 30 s left",
        "b 15/20 steps, 30 s, about 30 s left",
    ]


def test_an_unknown_total_has_no_end(clock, console):
    with progress.ProgressBars(console) as bars:
        bar = bars.add("reading", None, "rows/s")
        clock[0] += 40
        bar.advance(80, 80)
    assert lines(console) == ["reading 80, 2 rows/s, 40 s"]


def test_items_are_named_before_they_are_done(console):
    done = list(progress.each("bench", ["small", "large"], console))
    assert done == ["small", "large"]
    assert lines(console) == ["bench: small (0/2 cells done)", "bench: large (1/2 cells done)"]


def test_notes_are_rare(clock, capsys):
    with progress.ProgressBar("sampling", 1, "tok/s") as bar:
        for _ in range(3):
            bar.note("tried again")
            clock[0] += 4
        bar.print("refused")
    assert capsys.readouterr().err.split("\n") == ["tried again", "tried again", "refused", ""]
