"""Apply, check and revert the SpecForge patch series.

The series of a SpecForge version is ``patches/specforge/<version>/``: a file ``series`` that names
``git format-patch`` files in order. A *target* is the directory that holds the ``specforge``
package: site-packages, a checkout or an unpacked wheel.

How nothing is ever half done:

- The whole series is first applied by ``git apply`` (no fuzz, no three-way merge) to a copy of the
  files concerned. The target is written only when every patch applied.
- ``specforge/.specforge-lk/`` in the target receives the original bytes, the new files and, last,
  ``manifest.json`` with the sha256 of every file before and after. Only then are the new files
  renamed over the old ones. The state of a target is read from these hashes, not from a flag, so
  it is right after a crash at any point, and both ``apply`` and ``revert`` recover from one.
- Renaming also leaves alone a package cache whose files pip or uv linked into the environment.

The RECORD of an installed wheel stays as it is, so ``revert`` gives back an identical tree. Hence
``pip uninstall specforge`` on a patched install leaves the files that the series added and
``.specforge-lk/`` behind: revert first. ``pip install --force-reinstall`` needs only a new apply.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import email
import email.policy
import enum
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "specforge"
_DIFF_HEADER = re.compile(
    r"^diff --git a/(?P<old>.+) b/(?P<new>.+)\n(?P<mode>(?:new|deleted) file)?", re.MULTILINE
)


class PatchError(Exception):
    """An expected failure; the message names the file or value and the remedy."""


class TargetError(PatchError):
    """No SpecForge of a known version where it was looked for."""


class UnknownVersionError(TargetError):
    """There is no patch series for the target's version."""


class GitError(PatchError):
    """``git`` cannot be run."""


class RefusedError(PatchError):
    """The target cannot be patched or reverted as it is; nothing was written."""


class ForeignEditsError(RefusedError):
    """``files`` hold edits that neither SpecForge nor the series made."""

    def __init__(self, files: Iterable[str], remedy: str) -> None:
        self.files = tuple(files)
        super().__init__(f"foreign edits in {', '.join(self.files)}: {remedy}")


class PatchFailedError(RefusedError):
    """A patch does not apply; ``reason`` is what git said."""

    def __init__(self, patch: str, reason: str) -> None:
        self.patch, self.reason = patch, reason
        super().__init__(f"{patch} does not apply: {reason}")


@dataclass(frozen=True)
class Patch:
    """One ``git format-patch`` file. ``changes`` maps a path to add, modify or delete."""

    path: Path
    subject: str
    sha256: str
    changes: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Series:
    """The patches for one SpecForge version, in the order in which they apply."""

    version: str
    patches: tuple[Patch, ...]

    @property
    def digests(self) -> dict[str, str]:
        return {patch.name: patch.sha256 for patch in self.patches}


@dataclass(frozen=True)
class Target:
    """A directory that holds ``specforge/``; ``record`` maps the paths of a wheel to its hashes."""

    root: Path
    version: str
    record: Mapping[str, str] | None = None

    @property
    def state_dir(self) -> Path:
        return self.root / PACKAGE / ".specforge-lk"

    @property
    def takes_tests(self) -> bool:
        """Whether ``tests/`` beside the package is SpecForge's own (a checkout has pyproject)."""
        return (self.root / "pyproject.toml").is_file() and (self.root / "tests").is_dir()


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


class State(enum.StrEnum):
    """What a target holds, read from the hashes of its files."""

    PRISTINE = "pristine"
    APPLIED = "applied"
    PARTIAL = "partially applied"
    FOREIGN = "foreign edits"


@dataclass(frozen=True)
class Status:
    """``current``: what is applied is today's series; ``problem``: which files are foreign."""

    state: State
    current: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Applied:
    """What ``apply`` did: ``unchanged``, or ``files`` written over what ``replaced`` names."""

    unchanged: bool
    files: tuple[str, ...] = ()
    replaced: str | None = None


@dataclass(frozen=True)
class _Manifest:
    version: str
    tests: bool
    patches: Mapping[str, str]
    files: Mapping[str, tuple[str | None, str | None]]
    directories: tuple[str, ...]

    @classmethod
    def read(cls, target: Target) -> _Manifest | None:
        path = target.state_dir / "manifest.json"
        if not path.is_file():
            return None
        manifest = cls(**json.loads(path.read_text("utf-8")))
        if manifest.version != target.version:
            raise TargetError(
                f"{target.state_dir} belongs to SpecForge {manifest.version}, but {target.root} "
                f"holds {target.version}: delete {target.root / PACKAGE} and reinstall SpecForge"
            )
        return manifest

    def holds(self, series: Series) -> bool:
        return list(self.patches.items()) == list(series.digests.items())

    def survey(self, target: Target) -> tuple[State, tuple[str, ...]]:
        """The state of the target and the files that are neither original nor patched."""
        now = {path: _sha256(_read(target.root / path)) for path in self.files}
        foreign = tuple(path for path, digest in now.items() if digest not in self.files[path])
        if foreign:
            return State.FOREIGN, foreign
        if all(now[path] == after for path, (_, after) in self.files.items()):
            return State.APPLIED, ()
        if all(now[path] == before for path, (before, _) in self.files.items()):
            return State.PRISTINE, ()
        return State.PARTIAL, ()


def series_root() -> Path:
    """Where the series live: inside the installed wheel, or at the root of the repository."""
    package = Path(__file__).resolve().parent
    installed = package / "patches" / PACKAGE
    return installed if installed.is_dir() else package.parent / "patches" / PACKAGE


def known_versions() -> list[str]:
    """SpecForge versions that have a series."""
    return sorted(path.parent.name for path in series_root().glob("*/series"))


def load_series(version: str) -> Series:
    """Read the series of a SpecForge version; UnknownVersionError lists the known ones."""
    if version not in known_versions():
        raise UnknownVersionError(
            f"no patch series for SpecForge {version}; known versions: "
            f"{', '.join(known_versions()) or 'none'}"
        )
    folder = series_root() / version
    lines = (line.partition("#")[0].strip() for line in (folder / "series").read_text().split("\n"))
    return Series(version, tuple(_load_patch(folder / line) for line in lines if line))


def find_target(path: Path | None = None) -> Target:
    """The SpecForge in ``path``, or by default the installed one, found without importing it."""
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise TargetError(
                "SpecForge is not installed in this environment: install specforge, "
                "or name a checkout with --target"
            )
        path = Path(spec.origin).parent.parent
        # As pip does, never change another environment that this one merely sees.
        inside = path.resolve().is_relative_to(Path(sys.prefix).resolve())
        if sys.prefix != sys.base_prefix and not inside:
            raise TargetError(
                f"SpecForge in {path} is outside this virtual environment: install specforge "
                f"here, or confirm with --target {path}"
            )
    root = path.resolve()
    if not (root / PACKAGE / "__init__.py").is_file():
        raise TargetError(
            f"{path} holds no {PACKAGE}/ package: "
            "--target takes the directory that contains specforge/"
        )
    found = sorted(root.glob(f"{PACKAGE}-*.dist-info"))
    if len(found) > 1:
        names = ", ".join(info.name for info in found)
        raise TargetError(f"{root} holds several versions ({names}): reinstall SpecForge")
    if found:
        metadata = email.message_from_bytes((found[0] / "METADATA").read_bytes())
        return Target(root, metadata["Version"], _read_record(found[0] / "RECORD"))
    return Target(root, _checkout_version(root))


def plan(target: Target, series: Series, *, tests: bool | None = None) -> Plan:
    """Apply the series to a copy of the target's files, as they were before any patching.

    Args:
        tests: whether hunks outside ``specforge/`` take part. None: as they were applied, else
            only in a checkout with a ``tests/`` directory.
    """
    manifest = _Manifest.read(target)
    if tests is None:
        tests = manifest.tests if manifest else target.takes_tests
    paths = {path for patch in series.patches for path in patch.changes}
    paths = {path for path in paths if tests or path.startswith(f"{PACKAGE}/")}
    before = {path: _original(target, manifest, path) for path in sorted(paths)}
    if foreign := [path for path, data in before.items() if _is_foreign(target, path, data)]:
        remedy = (
            "not what SpecForge's wheel holds; reinstall it with "
            f"`pip install --force-reinstall --no-deps specforge=={target.version}`"
        )
        return Plan(tests, failure=ForeignEditsError(foreign, remedy))

    with tempfile.TemporaryDirectory(prefix="specforge-lk-") as scratch:
        root = Path(scratch).resolve()
        for path, data in before.items():
            if data is not None:
                _write(root / path, data)
        passed: list[str] = []
        try:
            for patch in series.patches:
                git_apply(root, patch, None if tests else f"{PACKAGE}/*")
                passed.append(patch.name)
        except PatchFailedError as failure:
            return Plan(tests, tuple(passed), failure=failure)
        changes = {}
        for path, data in before.items():
            after = _read(root / path)
            if after != data:
                # git writes by the mode in the patch; a file that was there keeps its own mode.
                kept = target.root / path if data is not None else root / path
                mode = kept.stat().st_mode & 0o777 if kept.is_file() else 0o644
                changes[path] = Change(data, after, mode)
    return Plan(tests, tuple(passed), changes)


def status(target: Target, series: Series) -> Status:
    """What the target holds now. Runs git only where there is no record of an apply."""
    manifest = _Manifest.read(target)
    state, foreign = manifest.survey(target) if manifest else (State.PRISTINE, ())
    if manifest is None or state is State.PRISTINE:
        failure = plan(target, series).failure
        return Status(State.FOREIGN, False, str(failure)) if failure else Status(State.PRISTINE)
    problem = f"changed after apply: {', '.join(foreign)}" if foreign else None
    return Status(state, state is State.APPLIED and manifest.holds(series), problem)


def apply(target: Target, series: Series, *, tests: bool | None = None) -> Applied:
    """Write the patched files into the target, or nothing at all.

    An older series, and what a crash left, is reverted first; that is started only once the new
    series is known to apply to the original files.

    Raises:
        ForeignEditsError: files differ from the wheel's RECORD or were edited after an apply.
        PatchFailedError: a patch does not apply with zero fuzz.
    """
    manifest = _Manifest.read(target)
    replaced = None
    if manifest:
        state, foreign = manifest.survey(target)
        if foreign:
            raise ForeignEditsError(foreign, "changed after apply; `revert --force` discards that")
        if state is State.APPLIED and manifest.holds(series) and tests in (None, manifest.tests):
            return Applied(unchanged=True)
        replaced = {State.APPLIED: "an earlier series", State.PARTIAL: "an interrupted apply"}.get(
            state
        )
    dry = plan(target, series, tests=tests)
    if dry.failure:
        raise dry.failure
    if manifest:
        _restore(target, manifest)
    _install(target, series, dry)
    return Applied(False, tuple(dry.changes), replaced)


def revert(target: Target, *, force: bool = False) -> tuple[str, ...]:
    """Restore every file byte for byte; returns the restored paths, () if nothing was applied.

    Raises:
        ForeignEditsError: a patched file was edited after apply, and ``force`` is not set.
    """
    manifest = _Manifest.read(target)
    if manifest is None:
        # An apply that crashed before its manifest was written has changed no file.
        shutil.rmtree(target.state_dir, ignore_errors=True)
        return ()
    foreign = manifest.survey(target)[1]
    if foreign and not force:
        raise ForeignEditsError(foreign, "changed after apply; --force discards these edits")
    _restore(target, manifest)
    return tuple(manifest.files)


def git_apply(root: Path, patch: Patch, include: str | None = None, *options: str) -> None:
    """Apply one patch to the tree at ``root`` with zero fuzz, all of it or nothing.

    Args:
        include: only paths that match this glob, whose ``*`` also matches ``/``.
        options: further options of ``git apply``, such as ``--reverse``.
    """
    only = [f"--include={include}"] if include else []
    # In a subdirectory of a repository `git apply` skips paths without a word, and the user's
    # configuration may relax whitespace or convert line ends: run it outside both.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {
        "GIT_CEILING_DIRECTORIES": str(root.resolve().parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    command = ["git", "apply", "--whitespace=nowarn", *only, *options, str(patch.path.resolve())]
    try:
        run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise GitError("git was not found on PATH: install git, it applies the patches") from error
    if run.returncode:
        reason = "; ".join(line.removeprefix("error: ") for line in run.stderr.splitlines())
        raise PatchFailedError(patch.name, reason)


def _load_patch(path: Path) -> Patch:
    if not path.is_file():
        raise PatchError(f"{path.parent / 'series'} names {path.name}, which does not exist")
    data = path.read_bytes()
    subject = email.message_from_bytes(data, policy=email.policy.default)["Subject"] or path.stem
    changes = {}
    for match in _DIFF_HEADER.finditer(data.decode("utf-8", "surrogateescape")):
        if match["old"] != match["new"]:
            raise PatchError(f"{path.name} renames {match['old']}: format it with --no-renames")
        changes[match["new"]] = {"new file": "add", "deleted file": "delete"}.get(
            match["mode"], "modify"
        )
    return Patch(
        path, re.sub(r"^\[PATCH[^]]*\]\s*", "", subject), hashlib.sha256(data).hexdigest(), changes
    )


def _read_record(path: Path) -> dict[str, str] | None:
    """Hashes in a wheel's RECORD; None if it lists no package, as for an editable install."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as lines:
        record = {row[0]: row[1] for row in csv.reader(lines) if row}
    return record if f"{PACKAGE}/__init__.py" in record else None


def _checkout_version(root: Path) -> str:
    """The version in pyproject.toml, or in the file it points setuptools to."""
    path = root / "pyproject.toml"
    if not path.is_file():
        raise TargetError(
            f"{root}: version unknown, neither specforge-*.dist-info nor pyproject.toml is there"
        )
    data = tomllib.loads(path.read_text("utf-8"))
    dynamic = data.get("tool", {}).get("setuptools", {}).get("dynamic", {}).get("version", {})
    version = data.get("project", {}).get("version")
    if version is None and isinstance(file := dynamic.get("file"), str):
        version = (root / file).read_text("utf-8").strip()
    if version is None:
        raise TargetError(f"{path}: no project.version and no setuptools dynamic version file")
    return version


def _original(target: Target, manifest: _Manifest | None, path: str) -> bytes | None:
    """The bytes of a file before any patching: the backup if the series changed it."""
    if manifest and path in manifest.files:
        return _backup(target, path, manifest.files[path][0])
    return _read(target.root / path)


def _backup(target: Target, path: str, digest: str | None) -> bytes | None:
    data = _read(target.state_dir / "original" / path)
    if _sha256(data) != digest:
        raise RefusedError(
            f"the backup {target.state_dir / 'original' / path} is missing or damaged: "
            f"delete {target.root / PACKAGE} and reinstall SpecForge"
        )
    return data


def _is_foreign(target: Target, path: str, data: bytes | None) -> bool:
    """Whether an installed file differs from RECORD; a checkout's files are left to git."""
    if target.record is None or not path.startswith(f"{PACKAGE}/"):
        return False
    recorded = target.record.get(path)
    if recorded is None or data is None:
        return (recorded is None) != (data is None)
    algorithm, _, digest = recorded.partition("=")
    found = base64.urlsafe_b64encode(hashlib.new(algorithm, data).digest())
    return found.rstrip(b"=").decode() != digest


def _install(target: Target, series: Series, dry: Plan) -> None:
    """Write backups, new files and manifest to the state directory, then rename into place."""
    root, state = target.root, target.state_dir
    shutil.rmtree(state, ignore_errors=True)
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
            path: [_sha256(change.before), _sha256(change.after)]
            for path, change in dry.changes.items()
        },
        "directories": sorted(
            (str(parent) for parent in parents if not (root / parent).exists()), reverse=True
        ),
    }
    _write(state / "manifest.tmp", json.dumps(manifest, indent=1).encode())
    os.replace(state / "manifest.tmp", state / "manifest.json")
    for path, change in dry.changes.items():
        if change.after is None:
            (root / path).unlink()
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(state / "staged" / path, root / path)
    shutil.rmtree(state / "staged", ignore_errors=True)


def _restore(target: Target, manifest: _Manifest) -> None:
    """Undo ``_install`` from any point of it. The manifest goes last, so this can be repeated."""
    root, state = target.root, target.state_dir
    # All backups are verified before the first one is used.
    backups = {path: _backup(target, path, old) for path, (old, _) in manifest.files.items()}
    for path, data in backups.items():
        if data is None:
            _remove(root / path)
            continue
        staged = state / "staged" / path
        staged.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(state / "original" / path, staged)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, root / path)
    for directory in manifest.directories:
        with contextlib.suppress(OSError):  # not empty: holds files of somebody else
            (root / directory).rmdir()
    (state / "manifest.json").unlink()
    shutil.rmtree(state)


def _remove(path: Path) -> None:
    """Remove an added file and its bytecode."""
    path.unlink(missing_ok=True)
    cache = path.parent / "__pycache__"
    for compiled in cache.glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    with contextlib.suppress(OSError):  # absent, or holds the bytecode of other modules
        cache.rmdir()


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
