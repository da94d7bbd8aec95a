"""Files written over hours: a failure costs no row, a wrong name no file of somebody else."""

import json
import os
from pathlib import Path

import pytest

from specforge_lk.data.jsonl import LineFile, Place, open_lines
from specforge_lk.data.released import Layout, Source, convert

ROWS = [{"id": str(i), "text": "é\ud800" * i} for i in range(40)]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def write(path: Path, *batches: list[dict], settings: dict | None = None) -> None:
    with open_lines(path, settings or {"seed": 0}) as lines:
        for batch in batches:
            lines.append(batch)


class FullDisk:
    """A stream that takes half of what it is given, once, and then nothing until it is mended."""

    def __init__(self, stream) -> None:
        self.stream, self.full = stream, False

    def write(self, data: memoryview) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        self.full = True
        return self.stream.write(data[: len(data) // 2])

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def test_a_write_that_fails_half_way_leaves_no_half(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    with open_lines(path, {}) as lines:
        lines.append(ROWS[:10])
        disk = FullDisk(lines._stream)
        with pytest.raises(OSError, match="No space left"):
            LineFile(path, disk).append(ROWS[10:])
        lines.append(ROWS[20:30])
    assert read(path) == ROWS[:10] + ROWS[20:30]


@pytest.mark.parametrize("fatal", [0, 1])
def test_interrupted_while_writing_to_disk(
    fatal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C comes most likely in fsync: the rows of that moment are not doubled afterwards."""
    path = tmp_path / "out.jsonl"
    rows = [
        (
            Place(tmp_path, i),
            {"id": i, "conversation": [{"content": "q"}], "generated_message": {"content": "a"}},
        )
        for i in range(1200)
    ]
    source = Source("rows", 1200, lambda start, broken: iter(rows[start:]))
    calls, fsync = iter(range(100)), os.fsync

    def interrupted(descriptor: int) -> None:
        fsync(descriptor)
        if next(calls) == fatal:
            raise KeyboardInterrupt

    with open_lines(path, {}) as lines, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, lines, Layout())
    assert len(read(path)) == 500 * fatal
    with open_lines(path, {}) as lines:
        convert(source, lines, Layout())
    assert [row["source_row"] for row in read(path)] == list(range(1200))


@pytest.mark.parametrize("content", ['{"my": "config"}', '{"id": 1}\n{"id": 2}', "notes"])
def test_a_file_of_somebody_else_is_not_touched(content: str, tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is missing, so the settings"):
        write(path, ROWS)
    assert path.read_text() == content


@pytest.mark.parametrize("kept", [0, 3])
def test_a_torn_line_is_cut_off_and_settings_are_kept(kept: int, tmp_path: Path):
    path = tmp_path / "out.jsonl"
    write(path, ROWS[:kept])
    with path.open("a") as stream:
        stream.write('{"id": "3", "te')
    with pytest.raises(ValueError, match="seed=0, not 1; use the same"):
        write(path, ROWS, settings={"seed": 1})
    write(path, ROWS[kept:])
    assert read(path) == ROWS
