"""Write files and folders so that a reader finds the old content or the new one, never a half."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)  # left by a killed process that had the same number
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        _remove(temporary)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace the UTF-8 content of a file; see `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


__all__ = ["atomic_write", "write_text"]
