"""Apply, check and revert a patch series of SpecForge or SGLang (``PACKAGES``).

The series of a version is ``patches/<package>/<version>/``: a file ``series`` that names
``git format-patch`` files in order. A *target* is what it is applied to: site-packages, an
unpacked wheel or a checkout of the package's repository.

How nothing is ever half done:

- The whole series is first applied by ``git apply`` (no fuzz, no three-way merge) to a copy of the
  files concerned. The target is written only when every patch applied.
- ``.specforge-lk/`` in the package receives the original bytes, the new files and, last,
  ``manifest.json`` with the sha256 of every file before and after. Only then are the new files
  renamed over the old ones. The state of a target is read from these hashes, not from a flag, so
  it is right after a crash at any point, kill -9 included, and both ``apply`` and ``revert``
  recover from one. ``revert`` restores copies of the originals and removes the manifest last.
- ``apply`` and ``revert`` of one target wait for each other.
- Renaming also leaves alone a package cache whose files pip or uv linked into the environment.

The RECORD of an installed wheel stays as it is, so ``revert`` gives back an identical tree. Hence
``pip uninstall`` of a patched install leaves the files that the series added and
``.specforge-lk/`` behind: revert first. ``pip install --force-reinstall`` needs only a new apply.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import email
import email.policy
import enum
import fcntl
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A distribution that has patch series, and where its repository keeps what they change.

    ``name`` is that of the distribution, of the import package and of the folder in ``patches/``.
    The import package is in the directory ``source`` of the repository, which holds
    pyproject.toml too; ``tests`` is the directory of the package's own tests.
    """

    name: str
    title: str
    source: str
    tests: str

    @property
    def path(self) -> str:
        """The import package in the repository, and so in the patches."""
        return (Path(self.source) / self.name).as_posix()


#: Every package that ``specforge-lk patch`` knows, by name.
PACKAGES: Mapping[str, Package] = {
    package.name: package
    for package in (
        Package("specforge", "SpecForge", source=".", tests="tests"),
        Package("sglang", "SGLang", source="python", tests="test"),
    )
}
SPECFORGE = PACKAGES["specforge"]
_DIFF_HEADER = re.compile(
    r"^diff --git a/(?P<old>.+) b/(?P<new>.+)\n(?P<mode>(?:new|deleted) file)?", re.MULTILINE
)


class PatchError(Exception):
    """An expected failure; the message names the file or value and the remedy."""


class TargetError(PatchError):
    """No package of a known version where it was looked for."""


class UnknownVersionError(TargetError):
    """There is no patch series for the target's version."""


class GitError(PatchError):
    """``git`` cannot be run."""


class RefusedError(PatchError):
    """The target cannot be patched or reverted as it is; nothing was written."""


class ForeignEditsError(RefusedError):
    """``files`` hold edits that neither the package nor the series made."""

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
    """The patches for one version of a package, in the order in which they apply."""

    package: Package
    version: str
    patches: tuple[Patch, ...]

    @property
    def digests(self) -> dict[str, str]:
        return {patch.name: patch.sha256 for patch in self.patches}


@dataclass(frozen=True)
class Target:
    """The package in ``root``; ``record`` maps the paths of a wheel to their hashes.

    ``checkout``: ``root`` is laid out as the repository is, else as site-packages are.
    """

    package: Package
    root: Path
    version: str
    checkout: bool
    record: Mapping[str, str] | None = None

    def locate(self, path: str) -> str:
        """Where a path of the repository is, relative to ``root``."""
        return path if self.checkout else path.removeprefix(f"{self.package.source}/")

    @property
    def package_dir(self) -> Path:
        return self.root / self.locate(self.package.path)

    @property
    def state_dir(self) -> Path:
        return self.package_dir / ".specforge-lk"

    @property
    def takes_tests(self) -> bool:
        """Whether the tests beside the package are its own (a checkout has pyproject.toml)."""
        has_project = (self.package_dir.parent / "pyproject.toml").is_file()
        return self.checkout and has_project and (self.root / self.package.tests).is_dir()


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
        try:
            manifest = cls(**json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise RefusedError(f"{path} is damaged ({error}): {_reinstall(target)}") from error
        if manifest.version != target.version:
            raise TargetError(
                f"{target.state_dir} belongs to {target.package.title} {manifest.version}, but "
                f"{target.root} holds {target.version}: {_reinstall(target)}"
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
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def known_versions(package: Package) -> list[str]:
    """Versions of the package that have a series."""
    return sorted(path.parent.name for path in series_root().glob(f"{package.name}/*/series"))


def load_series(package: Package, version: str) -> Series:
    """Read the series of a version; UnknownVersionError lists the known ones."""
    if version not in known_versions(package):
        raise UnknownVersionError(
            f"no patch series for {package.title} {version}; known versions: "
            f"{', '.join(known_versions(package)) or 'none'}"
        )
    folder = series_root() / package.name / version
    lines = (line.partition("#")[0].strip() for line in (folder / "series").read_text().split("\n"))
    return Series(package, version, tuple(_load_patch(folder / line) for line in lines if line))


def find_target(package: Package, path: Path | None = None) -> Target:
    """The package in ``path``, or by default the installed one, found without importing it."""
    name, title = package.name, package.title
    if path is None:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise TargetError(
                f"{title} is not installed in this environment: install {name}, "
                "or name a checkout with --target"
            )
        path = Path(spec.origin).parent.parent
        # As pip does, never change another environment that this one merely sees.
        inside = path.resolve().is_relative_to(Path(sys.prefix).resolve())
        if sys.prefix != sys.base_prefix and not inside:
            raise TargetError(
                f"{title} in {path} is outside this virtual environment: install {name} "
                f"here, or confirm with --target {path}"
            )
    root = path.resolve()
    checkout = (root / package.path / "__init__.py").is_file()
    if not checkout and not (root / name / "__init__.py").is_file():
        raise TargetError(
            f"{path} holds no {name}/ package: --target takes the directory that contains "
            f"{' or '.join(dict.fromkeys((f'{name}/', f'{package.path}/')))}"
        )
    found = sorted(root.glob(f"{name}-*.dist-info"))
    if len(found) > 1:
        names = ", ".join(info.name for info in found)
        raise TargetError(f"{root} holds several versions ({names}): reinstall {title}")
    if found:
        metadata = email.message_from_bytes((found[0] / "METADATA").read_bytes())
        record = _read_record(found[0] / "RECORD", name)
        return Target(package, root, metadata["Version"], checkout, record)
    project = root / package.source if checkout else root
    return Target(package, root, _checkout_version(project, name), checkout)


def plan(target: Target, series: Series, *, tests: bool | None = None) -> Plan:
    """Apply the series to a copy of the target's files, as they were before any patching.

    Args:
        tests: whether hunks outside the package take part. None: as they were applied, else
            only in a checkout that has the package's tests.
    """
    manifest = _Manifest.read(target)
    if tests is None:
        tests = manifest.tests if manifest else target.takes_tests
    package = target.package
    paths = {path for patch in series.patches for path in patch.changes}
    paths = {path for path in paths if tests or path.startswith(f"{package.path}/")}
    # Patches, and so the copy, are laid out as the repository is; the target may not be.
    places = {path: target.locate(path) for path in sorted(paths)}
    before = {path: _original(target, manifest, place) for path, place in places.items()}
    if foreign := [p for path, p in places.items() if _is_foreign(target, p, before[path])]:
        remedy = (
            f"not what {package.title}'s wheel holds; reinstall it with "
            f"`pip install --force-reinstall --no-deps {package.name}=={target.version}`"
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
                git_apply(root, patch, None if tests else f"{package.path}/*")
                passed.append(patch.name)
        except PatchFailedError as failure:
            return Plan(tests, tuple(passed), failure=failure)
        changes = {}
        for path, data in before.items():
            after = _read(root / path)
            if after != data:
                # git writes by the mode in the patch; a file that was there keeps its own mode.
                kept = target.root / places[path] if data is not None else root / path
                mode = kept.stat().st_mode & 0o777 if kept.is_file() else 0o644
                changes[places[path]] = Change(data, after, mode)
    return Plan(tests, tuple(passed), changes)


def status(target: Target, series: Series) -> Status:
    """What the target holds now. Runs git only where there is no record of an apply."""
    manifest = _Manifest.read(target)
    state, foreign = manifest.survey(target) if manifest else (State.PRISTINE, ())
    problem = None
    if state is State.PRISTINE:
        if failure := plan(target, series).failure:
            return Status(State.FOREIGN, False, str(failure))
        if target.state_dir.exists():
            problem = (
                f"an interrupted command left {target.state_dir}, but no file is changed: "
                "`revert` removes it, and so does `apply`"
            )
    elif state is State.PARTIAL:
        problem = "a command was interrupted: `revert` takes all of it back, `apply` finishes it"
    elif foreign:
        problem = f"changed after apply: {', '.join(foreign)}"
    current = manifest is not None and state is State.APPLIED and manifest.holds(series)
    return Status(state, current, problem)


def apply(target: Target, series: Series, *, tests: bool | None = None) -> Applied:
    """Write the patched files into the target, or nothing at all.

    An older series, and what a crash left, is reverted first; that is started only once the new
    series is known to apply to the original files.

    Raises:
        ForeignEditsError: files differ from the wheel's RECORD or were edited after an apply.
        PatchFailedError: a patch does not apply with zero fuzz.
    """
    with _alone(target):
        manifest = _Manifest.read(target)
        replaced = None
        if manifest:
            state, foreign = manifest.survey(target)
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
    with _alone(target):
        manifest = _Manifest.read(target)
        if manifest is None:
            # What a crash before the manifest was written, or after it was removed, left.
            _discard(target.state_dir)
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


def _read_record(path: Path, package: str) -> dict[str, str] | None:
    """Hashes in a wheel's RECORD; None if it lists no package, as for an editable install."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as lines:
        record = {row[0]: row[1] for row in csv.reader(lines) if row}
    return record if f"{package}/__init__.py" in record else None


def _checkout_version(root: Path, package: str) -> str:
    """The version in pyproject.toml, or in the file it points setuptools or setuptools-scm to."""
    path = root / "pyproject.toml"
    if not path.is_file():
        raise TargetError(
            f"{root}: version unknown, neither {package}-*.dist-info nor pyproject.toml is there"
        )
    data = tomllib.loads(path.read_text("utf-8"))
    if version := data.get("project", {}).get("version"):
        return version
    tools = data.get("tool", {})
    if file := tools.get("setuptools_scm", {}).get("version_file"):
        # Written when the checkout is installed or built: __version__ = version = '0.5.14'
        found = re.search(r"^__version__\b.*= *['\"](.+)['\"]", _text(root / file), re.MULTILINE)
        if found is None:
            raise TargetError(f"{root / file}: no __version__; `pip install -e {root}` writes it")
        return found[1]
    dynamic = tools.get("setuptools", {}).get("dynamic", {}).get("version", {})
    if isinstance(file := dynamic.get("file"), str) and (version := _text(root / file).strip()):
        return version
    raise TargetError(f"{path}: no project.version and no file that it names holds one")


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
            f"{_reinstall(target)}"
        )
    return data


def _reinstall(target: Target) -> str:
    return f"delete {target.package_dir} and reinstall {target.package.title}"


def _is_foreign(target: Target, path: str, data: bytes | None) -> bool:
    """Whether an installed file differs from RECORD; a checkout's files are left to git."""
    if target.record is None or not path.startswith(f"{target.package.name}/"):
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
        _write(staged, data)
        shutil.copystat(state / "original" / path, staged)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, root / path)
    for directory in manifest.directories:
        with contextlib.suppress(OSError):  # not empty: holds files of somebody else
            (root / directory).rmdir()
    (state / "manifest.json").unlink()
    _discard(state)


def _discard(state: Path) -> None:
    if state.exists():
        shutil.rmtree(state)


@contextlib.contextmanager
def _alone(target: Target) -> Iterator[None]:
    """Wait for other commands on this target. The lock of a killed process goes with it."""
    directory = os.open(target.package_dir, os.O_RDONLY)
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


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(mode)


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
