"""``specforge-lk`` in a process that is killed before its n-th change of a file."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from specforge_lk.cli import app

_CHANGES = ("os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.utime")


def run_killed(arguments: list[str], fatal: int, counter: Path) -> int:
    """Run the command in a fork of this process; returns its exit code, negative for a signal.

    It gets SIGKILL before change number ``fatal``, from 0: Python reports every system call that
    changes a file to audit hooks before it makes it. A file about to be written is left torn. A run
    that survives writes its number of changes to ``counter``.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        _run_killed(arguments, fatal, counter)
        os._exit(0)
    finally:
        os._exit(1)


def _run_killed(arguments: list[str], fatal: int, counter: Path) -> None:
    changes = 0

    def before_a_change(event: str, details: tuple) -> None:
        nonlocal changes
        writes = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in _CHANGES:
            return
        changes += 1
        if changes == fatal + 1:
            if writes:
                os.write(os.open(details[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), b"torn")
            os.kill(os.getpid(), signal.SIGKILL)

    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.addaudithook(before_a_change)
    app(arguments, standalone_mode=False)
    counter.write_text(str(changes))
