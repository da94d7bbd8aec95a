"""The real series, and a wheel laid out as its repository with a part of the series applied."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

from specforge_lk import patching
from specforge_lk.patching import (
    PACKAGES,
    SPECFORGE,
    SUPPORTED,
    Patch,
    Series,
    known_versions,
    load_series,
)

VERSION = SUPPORTED["specforge"]
SERIES = load_series(SPECFORGE)
ALL_SERIES = [
    load_series(package, version)
    for package in PACKAGES.values()
    for version in known_versions(package)
]


def unpack(wheel: Path, root: Path, series: Series) -> Path:
    """The wheel as the package's repository is laid out."""
    zipfile.ZipFile(wheel).extractall(root / series.package.source)
    return root


def absent_from_wheel(root: Path, series: Series, patch: Patch) -> list[str]:
    """Files that the patch edits and only the package's repository has, such as its own tests."""
    inside = f"{series.package.path}/"
    return sorted(
        path
        for path, kind in patch.changes.items()
        if kind != "add" and not path.startswith(inside) and not (root / path).exists()
    )


def apply_until(root: Path, series: Series, last: Patch) -> list[tuple[Patch, list[str]]]:
    """Apply the series up to ``last``; returns each patch with the options that left files out."""
    done = []
    for patch in series.patches:
        absent = absent_from_wheel(root, series, patch)
        options = [f"--exclude={path}" for path in absent]
        patching.git_apply(root, patch, *options)
        done.append((patch, options))
        if patch is last:
            if absent:
                warnings.warn(f"{patch.name}: left out {', '.join(absent)}", stacklevel=2)
            break
    return done
