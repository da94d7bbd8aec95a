"""The package that a series is applied to: where it is, its version and its layout."""

from __future__ import annotations

import csv
import email
import importlib.util
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specforge_lk.patching.errors import InstallationError
from specforge_lk.patching.series import Package


@dataclass(frozen=True)
class Installation:
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
        """The import package."""
        return self.root / self.locate(self.package.path)

    @property
    def state_dir(self) -> Path:
        """Where apply keeps the originals and its manifest."""
        return self.package_dir / ".specforge-lk"

    @property
    def takes_tests(self) -> bool:
        """Whether the tests beside the package are its own (a checkout has pyproject.toml)."""
        has_project = (self.package_dir.parent / "pyproject.toml").is_file()
        return self.checkout and has_project and (self.root / self.package.tests).is_dir()


def find_installation(package: Package, path: Path | None = None) -> Installation:
    """Find the package in ``path``, or by default the installed one, without importing it.

    Raises:
        InstallationError: it is not there, or not in this environment, or its version is unknown.
    """
    name, title = package.name, package.title
    if path is None:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InstallationError(
                f"{title} is not installed in this environment: install {name}, "
                "or name a checkout with --target"
            )
        path = Path(spec.origin).parent.parent
        # As pip does, never change another environment that this one merely sees.
        inside = path.resolve().is_relative_to(Path(sys.prefix).resolve())
        if sys.prefix != sys.base_prefix and not inside:
            raise InstallationError(
                f"{title} in {path} is outside this virtual environment: install {name} "
                f"here, or confirm with --target {path}"
            )
    root = path.resolve()
    checkout = (root / package.path / "__init__.py").is_file()
    if not checkout and not (root / name / "__init__.py").is_file():
        raise InstallationError(
            f"{path} holds no {name}/ package: --target takes the directory that contains "
            f"{' or '.join(dict.fromkeys((f'{name}/', f'{package.path}/')))}"
        )
    found = sorted(root.glob(f"{name}-*.dist-info"))
    if len(found) > 1:
        names = ", ".join(info.name for info in found)
        raise InstallationError(f"{root} holds several versions ({names}): reinstall {title}")
    if found:
        metadata = email.message_from_bytes((found[0] / "METADATA").read_bytes())
        record = _read_record(found[0] / "RECORD", name)
        return Installation(package, root, metadata["Version"], checkout, record)
    project = root / package.source if checkout else root
    return Installation(package, root, _checkout_version(project, name), checkout)


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
        raise InstallationError(
            f"{root}: version unknown, neither {package}-*.dist-info nor pyproject.toml is there"
        )
    data = tomllib.loads(path.read_text("utf-8"))
    if version := data.get("project", {}).get("version"):
        return version
    tools = data.get("tool", {})
    if file := tools.get("setuptools_scm", {}).get("version_file"):
        # Written when the checkout is installed or built: __version__ = version = '1.2.3'
        found = re.search(r"^__version__\b.*= *['\"](.+)['\"]", _text(root / file), re.MULTILINE)
        if found is None:
            raise InstallationError(
                f"{root / file}: no __version__; `pip install -e {root}` writes it"
            )
        return found[1]
    dynamic = tools.get("setuptools", {}).get("dynamic", {}).get("version", {})
    if isinstance(file := dynamic.get("file"), str) and (version := _text(root / file).strip()):
        return version
    raise InstallationError(f"{path}: no project.version and no file that it names holds one")


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""
