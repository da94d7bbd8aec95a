"""Patch series: their files, and one patch applied by git."""

from __future__ import annotations

import email
import email.policy
import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specforge_lk.patching.errors import (
    GitError,
    PatchError,
    PatchFailedError,
    UnknownVersionError,
)


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


@dataclass(frozen=True)
class Patch:
    """One ``git format-patch`` file. ``changes`` maps a path to add, modify or delete."""

    path: Path
    subject: str
    sha256: str
    changes: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclass(frozen=True)
class Series:
    """The patches for one version of a package, in the order in which they apply."""

    package: Package
    version: str
    patches: tuple[Patch, ...]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by the name of each patch."""
        return {patch.name: patch.sha256 for patch in self.patches}


def series_root() -> Path:
    """Where the series live: inside the installed wheel, or at the root of the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "patches"
    return installed if installed.is_dir() else package.parent / "patches"


def known_versions(package: Package) -> list[str]:
    """Versions of the package that have a series, oldest first."""
    found = {path.parent.name for path in series_root().glob(f"{package.name}/*/series")}
    return sorted(found, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


#: The supported version of every package: the newest that has a series.
SUPPORTED: Mapping[str, str] = {
    name: versions[-1]
    for name, package in PACKAGES.items()
    if (versions := known_versions(package))
}


def load_series(package: Package, version: str | None = None) -> Series:
    """Read the series of a version, by default of the supported one.

    Raises:
        UnknownVersionError: no series is for this version; the message lists those that have one.
        PatchError: a file is missing, or is not formatted as the series needs it.
    """
    version = version or SUPPORTED[package.name]
    if version not in known_versions(package):
        raise UnknownVersionError(
            f"no patch series for {package.title} {version}; known versions: "
            f"{', '.join(known_versions(package)) or 'none'}"
        )
    folder = series_root() / package.name / version
    lines = (line.partition("#")[0].strip() for line in (folder / "series").read_text().split("\n"))
    return Series(package, version, tuple(_load_patch(folder / line) for line in lines if line))


def git_apply(root: Path, patch: Patch, *options: str) -> None:
    """Apply one patch to the tree at ``root`` with zero fuzz, all of it or nothing.

    Args:
        root: a tree that is laid out as the package's repository.
        patch: the patch.
        options: options of ``git apply``, such as ``--reverse`` or ``--include=specforge/*``, whose
            ``*`` also matches ``/``.

    Raises:
        PatchFailedError: the patch does not apply.
        GitError: there is no git.
    """
    # In a subdirectory of a repository `git apply` skips paths without a word, and the user's
    # configuration may relax whitespace or convert line ends: run it outside both.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {
        "GIT_CEILING_DIRECTORIES": str(root.resolve().parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    command = ["git", "apply", "--whitespace=nowarn", *options, str(patch.path.resolve())]
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
    if b"\r\n" in data:
        raise PatchError(
            f"{path} has CRLF line ends, with which no patch applies: git's core.autocrlf, or an "
            "editor, changed them. In the clone of SpecForge-LK run 'git config core.autocrlf "
            "false', remove the folder patches, and 'git checkout -- patches'"
        )
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
