"""A file or a folder is written whole or not at all."""

import os
from pathlib import Path

import pytest

from specforge_lk.files import atomic_write, write_text


def test_content_is_replaced_whole_and_folders_are_made(tmp_path: Path):
    path = tmp_path / "made" / "note.json"
    write_text(path, "old")
    with atomic_write(path, durable=True) as temporary:
        temporary.write_text("α")
        assert path.read_text() == "old"
        assert temporary.suffix == ".tmp" and temporary.name.startswith(".note.json")
    assert path.read_text() == "α"
    assert os.listdir(path.parent) == ["note.json"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_content_and_no_temporary_file(tmp_path: Path, failure: type):
    path = tmp_path / "note.json"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.json"]


def test_a_folder_is_written_whole_or_removed(tmp_path: Path):
    path = tmp_path / "model"

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.mkdir()
            (temporary / "config.json").touch()
            raise EOFError

    with pytest.raises(EOFError):
        write_half()
    assert os.listdir(tmp_path) == []
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / "config.json").touch()
    assert os.listdir(path) == ["config.json"]


def test_what_a_killed_process_of_the_same_number_left_is_no_part_of_it(tmp_path: Path):
    left = tmp_path / f".model.{os.getpid()}.tmp"
    left.mkdir()
    (left / "torn").touch()
    with atomic_write(tmp_path / "model") as temporary:
        assert temporary == left
        temporary.mkdir()
    assert os.listdir(tmp_path / "model") == []
