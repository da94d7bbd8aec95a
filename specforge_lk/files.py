"""Write files and folders so that a reader finds the old content or the new one, never a half."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Lists the checksums of the weight files beside it, as ``sha256sum`` does.
CHECKSUMS = "SHA256SUMS"
#: Errors of a disk on which nothing more can be written.
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``, and rename what was written there when the block ends.

    If the block raises, what it wrote is removed and ``path`` stays as it was. The temporary name
    does not end as ``path`` does, so that no glob for ``*.json`` finds what a killed process left.

    Args:
        path: The file or folder to write; its parent folder is made if need be. A file that is
            there is replaced. A folder that is there must be removed in the block.
        durable: Bring a file to disk before it gets its name, so that it survives a power cut.

    Yields:
        Where to write.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)  # left by a killed process that had the same number
    try:
        with disk_errors(path):
            yield temporary
            if durable:
                with temporary.open("rb") as stream:
                    os.fsync(stream.fileno())
            temporary.replace(path)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say of a full disk which file was being written, and what to do.

    Raises:
        OSError: the disk is full, or a quota is reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or isinstance(error, DiskFull):
            raise
        raise DiskFull(path, error) from error


class DiskFull(OSError):
    """The disk is full; the message names the file, which is as it was before."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.path = path

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be written: {self.strerror}. Make room and run the same command "
            "again: it goes on from what is complete"
        )


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object that this package or another wrote to a file of its own.

    Args:
        path: the file.
        remedy: what to do where it is damaged.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a JSON object in UTF-8.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {str(found)[:40]!r}; {remedy}")
    return found


def compare_checksums(folder: Path, remedy: str) -> None:
    """Compare the files that SHA256SUMS lists; SpecForge's exports have one of their weights.

    Nothing is compared in a folder without it.

    Args:
        folder: Where both are.
        remedy: What to do where a file is another one.

    Raises:
        ValueError: a file that is listed is missing or not the one that is listed.
    """
    listed = folder / CHECKSUMS
    if not listed.is_file():
        return
    for line in listed.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition(" ")
        file = folder / name.strip(" *")
        if not file.is_file() or file_digest(file) != digest:
            raise ValueError(
                f"{file} is missing or not the one that {listed} lists; {remedy} or, if it was "
                f"replaced on purpose, remove {CHECKSUMS}"
            )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace the UTF-8 content of a file; see `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(record: Any, path: Path) -> None:
    """Write what ``torch.save`` takes; see `atomic_write`.

    It is put together in memory: of a full disk torch itself says neither that nor the file.
    """
    import torch

    content = io.BytesIO()
    torch.save(record, content)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


__all__ = [
    "CHECKSUMS",
    "DiskFull",
    "atomic_write",
    "compare_checksums",
    "disk_errors",
    "file_digest",
    "read_json",
    "save_tensors",
    "write_text",
]
