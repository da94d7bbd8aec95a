"""What an apply recorded: hashes before and after, and the originals of the files."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specforge_lk.patching.errors import InstallationError, RefusedError
from specforge_lk.patching.installation import Installation
from specforge_lk.patching.series import Series


class State(enum.StrEnum):
    """What an installation holds, read from the hashes of its files."""

    PRISTINE = "pristine"
    APPLIED = "applied"
    PARTIAL = "partially applied"
    FOREIGN = "foreign edits"


@dataclass(frozen=True)
class Manifest:
    """The record of an apply, ``manifest.json`` in the state directory.

    Attributes:
        version: of the package.
        tests: whether hunks outside the package took part.
        patches: sha256 of every patch by name, in order.
        files: sha256 of every changed file before and after; None: absent.
        directories: what apply created, deepest first.
    """

    version: str
    tests: bool
    patches: Mapping[str, str]
    files: Mapping[str, tuple[str | None, str | None]]
    directories: tuple[str, ...]

    @classmethod
    def read(cls, installation: Installation) -> Manifest | None:
        """Return the manifest of an installation; None where nothing is applied.

        Raises:
            RefusedError: the file is damaged.
            InstallationError: the package was replaced by another version.
        """
        path = installation.state_dir / "manifest.json"
        if not path.is_file():
            return None
        try:
            manifest = cls(**json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            remedy = _reinstall(installation)
            raise RefusedError(f"{path} is damaged ({error}): {remedy}") from error
        if manifest.version != installation.version:
            raise InstallationError(
                f"{installation.state_dir} belongs to {installation.package.title} "
                f"{manifest.version}, but {installation.root} holds {installation.version}: "
                f"{_reinstall(installation)}"
            )
        return manifest

    def holds(self, series: Series) -> bool:
        """Whether these patches, byte for byte and in this order, were applied."""
        return list(self.patches.items()) == list(series.digests.items())

    def survey(self, installation: Installation) -> tuple[State, tuple[str, ...]]:
        """Return the state of the installation, and files neither original nor patched."""
        now = {path: sha256(read(installation.root / path)) for path in self.files}
        foreign = tuple(path for path, digest in now.items() if digest not in self.files[path])
        if foreign:
            return State.FOREIGN, foreign
        if all(now[path] == after for path, (_, after) in self.files.items()):
            return State.APPLIED, ()
        if all(now[path] == before for path, (before, _) in self.files.items()):
            return State.PRISTINE, ()
        return State.PARTIAL, ()


def original(installation: Installation, manifest: Manifest | None, path: str) -> bytes | None:
    """Return a file's bytes before any patching: the backup if the series changed it."""
    if manifest and path in manifest.files:
        return backup(installation, path, manifest.files[path][0])
    return read(installation.root / path)


def backup(installation: Installation, path: str, digest: str | None) -> bytes | None:
    """Return the backup of a file, None if it was absent; RefusedError unless it has the digest."""
    data = read(installation.state_dir / "original" / path)
    if sha256(data) != digest:
        raise RefusedError(
            f"the backup {installation.state_dir / 'original' / path} is missing or damaged: "
            f"{_reinstall(installation)}"
        )
    return data


def _reinstall(installation: Installation) -> str:
    return f"delete {installation.package_dir} and reinstall {installation.package.title}"


def read(path: Path) -> bytes | None:
    """Return a file's bytes; None if it is absent."""
    return path.read_bytes() if path.is_file() else None


def sha256(data: bytes | None) -> str | None:
    """Return the digest of a file's bytes; None if it is absent."""
    return None if data is None else hashlib.sha256(data).hexdigest()
