"""JSONL files: read them, and write them over hours, with nothing lost or doubled by a crash.

Every command reads rows by `read_jsonl` or `numbered_rows`. What is wrong with a file or a row is
said in one form: file, line, the row's id, the value, and what to do. `Malformed` decides whether
such a row ends the command or is left out and counted.

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
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from specforge_lk.files import disk_errors, read_json, write_text

_BLOCK = 1 << 20
#: Longest excerpt of a value in a message.
_EXCERPT = 40
#: Share of a file's rows above which leaving them out is a mistake about the file, not about rows.
MOST_LEFT_OUT = 0.1

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_TO_UTF8 = "convert it: iconv -f {} -t UTF-8 {path} > NEW"
#: First bytes of files that hold no UTF-8 lines -> what they are, and the remedy.
_OTHERS = {
    b"\xff\xfe": ("UTF-16", _TO_UTF8.format("UTF-16", path="{path}")),
    b"\xfe\xff": ("UTF-16", _TO_UTF8.format("UTF-16", path="{path}")),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it: zstd -d {path}"),
    b"BZh": ("compressed by bzip2", "decompress it: bunzip2 -k {path}"),
    b"\xfd7zXZ\x00": ("compressed by xz", "decompress it: xz -dk {path}"),
    b"PK\x03\x04": ("a zip archive", "unpack it: unzip {path}"),
    b"PAR1": ("a Parquet file", "name it .parquet; specforge-lk data --source makes rows of it"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch what it stands for: git lfs pull"),
    b"<!doctype html": ("a web page", "download the file itself again"),
    b"<!DOCTYPE html": ("a web page", "download the file itself again"),
    b"<html": ("a web page", "download the file itself again"),
}
#: A JSON escape that may stand for half a character, in lower or upper case.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class RowError(ValueError):
    """A row that cannot be used; the message has file, line, id, the value and the remedy."""


class Place(NamedTuple):
    """Where a row stands; as text, ``rows.jsonl:3 (id 'a')``."""

    path: Path
    line: int
    id: object = None

    def __str__(self) -> str:
        known = "" if self.id is None else f" (id {_excerpt(self.id)})"
        return f"{self.path}:{self.line}{known}"


@dataclass
class Malformed:
    """What becomes of rows that cannot be used: the first ends the command, or they are counted.

    Attributes:
        skip: leave them out.
        left_out: what was wrong with each.
    """

    skip: bool = False
    left_out: list[str] = field(default_factory=list)

    def refuse(self, error: ValueError) -> None:
        """Count a row that cannot be used.

        Raises:
            ValueError: ``error``, unless such rows are left out.
        """
        if not self.skip:
            raise error
        self.left_out.append(str(error))


def read_jsonl(path: Path, malformed: Malformed | None = None) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a JSONL file, as `numbered_rows` does, without their places."""
    for _, row in numbered_rows(path, malformed):
        yield row


def numbered_rows(
    path: Path, malformed: Malformed | None = None, *, whole_characters: bool = True
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Read the JSON objects of a JSONL file, one a line, with the place of each.

    The file is UTF-8, with or without a byte order mark, and may be compressed by gzip whatever it
    is called. Empty lines are no rows.

    Args:
        path: the file.
        malformed: what becomes of rows that cannot be used; by default the first raises.
        whole_characters: refuse text with half a character, a lone surrogate, which no tokenizer
            takes and no server is sent.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        RowError: a line is not a JSON object, or not UTF-8.
        ValueError: the file is cut, compressed otherwise, or in another encoding.
    """
    malformed = malformed or Malformed()
    if not path.is_file():
        raise FileNotFoundError(_no_file(path))
    with path.open("rb") as raw:
        packed = raw.peek(2).startswith(_GZIP)
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        for number, line in _lines(path, cast(IO[bytes], stream)):
            if not line.strip():
                continue
            try:
                found = _row(Place(path, number), line, whole_characters)
            except RowError as error:
                malformed.refuse(error)
            else:
                yield found


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; give one of its JSONL files"
    if path.exists():
        return f"{path} can be read once only; write it to a file first: cat {path} > NEW"
    return f"{path} does not exist; give a JSONL file, perhaps compressed by gzip"


def _refuse_other_formats(path: Path, start: bytes) -> None:
    for magic, (what, remedy) in _OTHERS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}, not UTF-8 lines; {remedy.format(path=path)}")
    zeros = [byte == 0 for byte in start[:4]]
    for kind, pattern in (("UTF-16LE", [False, True] * 2), ("UTF-16BE", [True, False] * 2)):
        if zeros == pattern:
            remedy = _TO_UTF8.format(kind, path=path)
            raise ValueError(f"{path} is {kind}, not UTF-8 lines; {remedy}")
    if b"\0" in start[:8]:
        raise ValueError(f"{path} is a binary file, not UTF-8 lines; give a JSONL file")


def _lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, without a byte order mark."""
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                _refuse_other_formats(path, line)
                line = line.removeprefix(_BOM)
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is cut or damaged after line {number} ({error}); copy or download it again, "
            f"or keep what is whole: gzip -dc {path} > NEW"
        ) from error


def _row(place: Place, line: bytes, whole_characters: bool) -> tuple[Place, dict[str, Any]]:
    """Read a line.

    Raises:
        RowError: it is not a JSON object, or not UTF-8.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowError(
            f"{place} is not UTF-8 (byte 0x{line[error.start]:02x} after "
            f"{_excerpt(line[: error.start].decode()[-_EXCERPT:])}); if the file is Latin-1, "
            + _TO_UTF8.format("LATIN1", path=place.path)
        ) from None
    try:
        row = json.loads(text, object_pairs_hook=distinct_fields)
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, brackets
        reason = getattr(error, "msg", str(error))
        shown = _excerpt(text.strip())
        rest = text[getattr(error, "pos", 0) :].strip()
        if rest == ",":
            remedy = f"remove the comma at the end: sed 's/,\\s*$//' {place.path} > NEW"
        elif place.line > 1:
            remedy = "mend or remove the line"
        elif text.lstrip()[:1] not in ("[", "{"):
            remedy = "give a file with one JSON object a line"
        elif not rest or reason == "Extra data":  # an object over lines, or objects on one
            remedy = "write one object a line: jq -c '.[]?' of an array, jq -c . of objects"
        else:
            remedy = "mend or remove the line"
        raise RowError(f"{place} is not JSON ({reason}): {shown}; {remedy}") from None
    if not isinstance(row, dict):
        if isinstance(row, list) and place.line == 1:
            remedy = f"write one object a line: jq -c '.[]' {place.path} > NEW"
        else:
            remedy = "mend or remove the line"
        raise RowError(f"{place} must be a JSON object, got {_excerpt(text.strip())}; {remedy}")
    place = place._replace(id=row.get("id"))
    if whole_characters and _SURROGATE.search(line) and (half := _half_character(row)):
        where, text = half
        raise RowError(
            f"{place} has half a character, {text!a}, in its field {where!r}: no tokenizer "
            "takes it; write it out or remove it"
        )
    return place, row


def distinct_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, of which no field replaces another of the same name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice[:40]!r} occurs twice")
    return found


def _half_character(value: Any, name: str = "") -> tuple[str, str] | None:
    """Return the name of the first field with a lone surrogate, and what surrounds it there."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return name, value[max(0, error.start - 8) : error.end + 8]
        return None
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        keys = ((name, key) for key in value)
        items = chain(keys, ((f"{name}.{key}".lstrip("."), item) for key, item in value.items()))
    elif isinstance(value, list):
        items = ((f"{name}[{index}]", item) for index, item in enumerate(value))
    return next((found for key, item in items if (found := _half_character(item, key))), None)


def _excerpt(value: object) -> str:
    """Return a value as it stands in a message: short, and in characters that any terminal has."""
    text = ascii(value) if not isinstance(value, str) else ascii(value[: _EXCERPT + 1])
    return text if len(text) <= _EXCERPT + 4 else f"{text[:_EXCERPT]}..."


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
            with disk_errors(self.path):
                while rest:
                    rest = rest[self._stream.write(rest) :]
                os.fsync(self._stream.fileno())
        except BaseException:
            self._stream.truncate(end)
            raise


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
            raise ValueError(
                f"{path} is being written by another process; wait for it, or name another file"
            ) from error
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
        before = read_json(path, "write to a new file")
        for name in sorted(settings.keys() | before.keys()):
            if settings.get(name) != before.get(name):
                raise ValueError(
                    f"{path.name.removesuffix('.settings.json')} was begun with "
                    f"{name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}; use the same value, or write to a new file"
                )
        return
    write_text(path, json.dumps(settings, indent=2) + "\n", durable=True)


__all__ = [
    "LineFile",
    "Malformed",
    "Place",
    "RowError",
    "numbered_rows",
    "open_lines",
    "read_jsonl",
]
