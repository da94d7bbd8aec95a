"""JSONL files: read them, and write them over hours, with nothing lost or doubled by a crash.

Rows are on disk when `LineFile.append` returns. When the file is opened again, a line that a crash
tore is cut off. The settings that the rows depend on are kept beside the file; they must then be
the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from specforge_lk.files import write_text

_BLOCK = 1 << 20


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a .jsonl or .jsonl.gz file, one per line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object; the message has file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} must be a JSON object, got {line.strip()[:40]}")
            yield row


class LineFile:
    """A JSONL file open for appending; see `open_lines`."""

    def __init__(self, path: Path, stream: FileIO) -> None:
        self.path = path
        self._stream = stream

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add all rows, which then survive a crash, or none if this raises.

        A full disk or Ctrl-C may stop it in the middle. The file is then cut to its old length, so
        that no half line stays, and the caller may append the same rows again.
        """
        end = self._stream.seek(0, os.SEEK_END)
        rest = memoryview(b"".join(_line(row) for row in rows))
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream.fileno())
        except BaseException:
            self._stream.truncate(end)
            raise

    def last(self) -> dict[str, Any] | None:
        """Return the last row; None if there is none."""
        end = self._stream.seek(0, os.SEEK_END)
        if not end:
            return None
        start = _after_newline(self._stream, end - 1)
        self._stream.seek(start)
        return json.loads(self._stream.read(end - start))


def _line(row: dict[str, Any]) -> bytes:
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but it has a JSON escape
        return f"{json.dumps(row)}\n".encode()


@contextlib.contextmanager
def open_lines(path: Path, settings: dict[str, Any]) -> Iterator[LineFile]:
    """Open a JSONL file to begin or continue it, alone.

    Args:
        path: the file; its folder is made if need be.
        settings: what the rows depend on.

    Raises:
        ValueError: the file was begun with other settings, another process writes to it, or it is
            compressed.
    """
    if path.suffix == ".gz":
        raise ValueError(f"{path}: a compressed file cannot be continued; name it .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered, so that close() cannot flush a failed append.
    with path.open("a+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process") from error
        end = stream.seek(0, os.SEEK_END)
        _check_settings(path.with_name(f"{path.name}.settings.json"), settings, new=end == 0)
        # The settings match, so the file is ours and an unterminated last line is a torn write.
        stream.truncate(_after_newline(stream, end))
        yield LineFile(path, stream)


def _after_newline(stream: FileIO, end: int) -> int:
    """Return the position after the last newline before ``end``; 0 if there is none."""
    while end:
        start = max(0, end - _BLOCK)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _check_settings(path: Path, settings: dict[str, Any], *, new: bool) -> None:
    if not new:
        if not path.exists():
            raise ValueError(
                f"{path} is missing, so the settings of the rows beside it are unknown; "
                "write to a new file"
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(settings.keys() | before.keys()):
            if settings.get(name) != before.get(name):
                raise ValueError(
                    f"the file was begun with {name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}; use the same value, or write to a new file"
                )
        return
    write_text(path, json.dumps(settings, indent=2) + "\n", durable=True)


__all__ = ["LineFile", "open_lines", "read_jsonl"]
