"""Dry run, apply, revert and status of a series in an installation."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from specforge_lk.files import write_text
from specforge_lk.patching.errors import ForeignEditsError, PatchFailedError
from specforge_lk.patching.installation import Installation
from specforge_lk.patching.manifest import Manifest, State, backup, original, read, sha256
from specforge_lk.patching.series import Series, git_apply


@dataclass(frozen=True)
class Change:
    """A file's bytes before and after the series (None: absent) and the mode it gets."""

    before: bytes | None
    after: bytes | None
    mode: int


@dataclass(frozen=True)
class Plan:
    """A dry run: the patches that apply, the files that change, or why the series does not."""

    tests: bool
    passed: tuple[str, ...] = ()
    changes: Mapping[str, Change] = field(default_factory=dict)
    failure: ForeignEditsError | PatchFailedError | None = None


@dataclass(frozen=True)
class Status:
    """``current``: what is applied is today's series; ``problem``: what is wrong and the remedy."""

    state: State
    current: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Applied:
    """What ``apply`` did: ``unchanged``, or ``files`` written over what ``replaced`` names."""

    unchanged: bool
    files: tuple[str, ...] = ()
    replaced: str | None = None


def plan(installation: Installation, series: Series, *, tests: bool | None = None) -> Plan:
    """Apply the series to a copy of the installation's files, as they were before any patching.

    Args:
        tests: whether hunks outside the package take part. None: as they were applied, else
            only in a checkout that has the package's tests.
    """
    manifest = Manifest.read(installation)
    if tests is None:
        tests = manifest.tests if manifest else installation.takes_tests
    package = installation.package
    paths = {path for patch in series.patches for path in patch.changes}
    paths = {path for path in paths if tests or path.startswith(f"{package.path}/")}
    # Patches, and so the copy, are laid out as the repository is; the installation may not be.
    places = {path: installation.locate(path) for path in sorted(paths)}
    before = {path: original(installation, manifest, place) for path, place in places.items()}
    if foreign := [p for path, p in places.items() if _is_foreign(installation, p, before[path])]:
        remedy = (
            f"not what {package.title}'s wheel holds; reinstall it with "
            f"`pip install --force-reinstall --no-deps {package.name}=={installation.version}`"
        )
        return Plan(tests, failure=ForeignEditsError(foreign, remedy))

    with tempfile.TemporaryDirectory(prefix="specforge-lk-") as scratch:
        root = Path(scratch).resolve()
        for path, data in before.items():
            if data is not None:
                _write(root / path, data)
        only = () if tests else (f"--include={package.path}/*",)
        passed: list[str] = []
        try:
            for patch in series.patches:
                git_apply(root, patch, *only)
                passed.append(patch.name)
        except PatchFailedError as failure:
            crlf = [places[path] for path, data in before.items() if data and b"\r\n" in data]
            if not crlf:
                return Plan(tests, tuple(passed), failure=failure)
            remedy = (
                f"their line ends are CRLF, so that {failure.patch} does not apply; check them out "
                "with core.autocrlf=false"
            )
            return Plan(tests, tuple(passed), failure=ForeignEditsError(crlf, remedy))
        changes = {}
        for path, data in before.items():
            after = read(root / path)
            if after != data:
                # git writes by the mode in the patch; a file that was there keeps its own mode.
                kept = installation.root / places[path] if data is not None else root / path
                mode = kept.stat().st_mode & 0o777 if kept.is_file() else 0o644
                changes[places[path]] = Change(data, after, mode)
    return Plan(tests, tuple(passed), changes)


def status(installation: Installation, series: Series) -> Status:
    """Return what the installation holds now; git runs only where nothing records an apply."""
    manifest = Manifest.read(installation)
    state, foreign = manifest.survey(installation) if manifest else (State.PRISTINE, ())
    problem = None
    if state is State.PRISTINE:
        if failure := plan(installation, series).failure:
            return Status(State.FOREIGN, False, str(failure))
        if installation.state_dir.exists():
            problem = (
                f"an interrupted command left {installation.state_dir}, but no file is changed: "
                "`revert` removes it, and so does `apply`"
            )
    elif state is State.PARTIAL:
        problem = "a command was interrupted: `revert` takes all of it back, `apply` finishes it"
    elif foreign:
        problem = f"changed after apply: {', '.join(foreign)}"
    current = manifest is not None and state is State.APPLIED and manifest.holds(series)
    return Status(state, current, problem)


def apply(installation: Installation, series: Series, *, tests: bool | None = None) -> Applied:
    """Write the patched files into the installation, or nothing at all.

    An older series, and what a crash left, is reverted first; that is started only once the new
    series is known to apply to the original files.

    Raises:
        ForeignEditsError: files differ from the wheel's RECORD or were edited after an apply.
        PatchFailedError: a patch does not apply with zero fuzz.
    """
    with _alone(installation):
        manifest = Manifest.read(installation)
        replaced = None
        if manifest:
            state, foreign = manifest.survey(installation)
            if foreign:
                remedy = "changed after apply; `revert --force` discards that"
                raise ForeignEditsError(foreign, remedy)
            applied = state is State.APPLIED and manifest.holds(series)
            if applied and tests in (None, manifest.tests):
                return Applied(unchanged=True)
            replaced = {
                State.APPLIED: "an earlier series",
                State.PARTIAL: "an interrupted apply",
            }.get(state)
        dry = plan(installation, series, tests=tests)
        if dry.failure:
            raise dry.failure
        if manifest:
            _restore(installation, manifest)
        _install(installation, series, dry)
        return Applied(False, tuple(dry.changes), replaced)


def revert(installation: Installation, *, force: bool = False) -> tuple[str, ...]:
    """Restore every file byte for byte; return the restored paths, () if nothing was applied.

    Raises:
        ForeignEditsError: a patched file was edited after apply, and ``force`` is not set.
    """
    with _alone(installation):
        manifest = Manifest.read(installation)
        if manifest is None:
            # What a crash before the manifest was written, or after it was removed, left.
            _discard(installation.state_dir)
            return ()
        foreign = manifest.survey(installation)[1]
        if foreign and not force:
            raise ForeignEditsError(foreign, "changed after apply; --force discards these edits")
        _restore(installation, manifest)
        return tuple(manifest.files)


def _is_foreign(installation: Installation, path: str, data: bytes | None) -> bool:
    """Whether an installed file differs from RECORD; a checkout's files are left to git."""
    if installation.record is None or not path.startswith(f"{installation.package.name}/"):
        return False
    recorded = installation.record.get(path)
    if recorded is None or data is None:
        return (recorded is None) != (data is None)
    algorithm, _, digest = recorded.partition("=")
    found = base64.urlsafe_b64encode(hashlib.new(algorithm, data).digest())
    return found.rstrip(b"=").decode() != digest


def _install(installation: Installation, series: Series, dry: Plan) -> None:
    """Write backups, new files and manifest to the state directory, then rename into place."""
    root, state = installation.root, installation.state_dir
    _discard(state)
    # What an apply writes is not the checkout's business.
    _write(state / ".gitignore", b"*\n")
    parents = {parent for path in dry.changes for parent in Path(path).parents}
    for path, change in dry.changes.items():
        if change.before is not None:
            _write(state / "original" / path, change.before)
            # Mode and mtime too: with its mtime restored, a file's bytecode is valid again.
            shutil.copystat(root / path, state / "original" / path)
        if change.after is not None:
            _write(state / "staged" / path, change.after, change.mode)
    manifest = {
        "version": series.version,
        "tests": dry.tests,
        "patches": series.digests,
        "files": {
            path: [sha256(change.before), sha256(change.after)]
            for path, change in dry.changes.items()
        },
        "directories": sorted(
            (str(parent) for parent in parents if not (root / parent).exists()), reverse=True
        ),
    }
    write_text(state / "manifest.json", json.dumps(manifest, indent=1), durable=True)
    for path, change in dry.changes.items():
        if change.after is None:
            (root / path).unlink()
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (state / "staged" / path).replace(root / path)
    shutil.rmtree(state / "staged", ignore_errors=True)


def _restore(installation: Installation, manifest: Manifest) -> None:
    """Undo ``_install`` from any point of it. The manifest goes last, so this can be repeated."""
    root, state = installation.root, installation.state_dir
    # All backups are verified before the first one is used.
    backups = {path: backup(installation, path, old) for path, (old, _) in manifest.files.items()}
    for path, data in backups.items():
        if data is None:
            _remove(root / path)
            continue
        # Staged in the state directory, so that a kill leaves nothing among the package's files.
        staged = state / "staged" / path
        _write(staged, data)
        shutil.copystat(state / "original" / path, staged)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        staged.replace(root / path)
    for directory in manifest.directories:
        with contextlib.suppress(OSError):  # not empty: holds files of somebody else
            (root / directory).rmdir()
    (state / "manifest.json").unlink()
    _discard(state)


def _discard(state: Path) -> None:
    if state.exists():
        shutil.rmtree(state)


@contextlib.contextmanager
def _alone(installation: Installation) -> Iterator[None]:
    """Wait for other commands on this installation. The lock of a killed process goes with it."""
    directory = os.open(installation.package_dir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _remove(path: Path) -> None:
    """Remove an added file and its bytecode."""
    path.unlink(missing_ok=True)
    cache = path.parent / "__pycache__"
    for compiled in cache.glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    with contextlib.suppress(OSError):  # absent, or holds the bytecode of other modules
        cache.rmdir()


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)
