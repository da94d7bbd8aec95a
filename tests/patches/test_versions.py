"""The supported release of every upstream is the newest folder of patches/."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from specforge_lk.patching import SPECFORGE, SUPPORTED, known_versions, series

ROOT = Path(__file__).parents[2]


def test_the_extra_installs_the_supported_release() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["specforge"] == [f"specforge=={SUPPORTED['specforge']}"]
    assert set(SUPPORTED) == {path.name for path in (ROOT / "patches").iterdir() if path.is_dir()}


def test_versions_are_ordered_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("0.10.0", "0.2.0", "0.9.1"):
        (tmp_path / "specforge" / version).mkdir(parents=True)
        (tmp_path / "specforge" / version / "series").touch()
    monkeypatch.setattr(series, "series_root", lambda: tmp_path)
    assert known_versions(SPECFORGE) == ["0.2.0", "0.9.1", "0.10.0"]
