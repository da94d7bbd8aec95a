"""The supported release of every upstream is the newest folder of patches/."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from patch_helpers import write_wheel
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.patching import PACKAGES, SPECFORGE, SUPPORTED, known_versions, series

ROOT = Path(__file__).parents[2]


def test_the_extra_installs_the_supported_release() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["specforge"] == [f"specforge=={SUPPORTED['specforge']}"]
    assert set(SUPPORTED) == {path.name for path in (ROOT / "patches").iterdir() if path.is_dir()}


def test_versions_are_ordered_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.10.0", "0.2.0", "0.9.1"):
        (tmp_path / "specforge" / version).mkdir(parents=True)
        (tmp_path / "specforge" / version / "series").touch()
    monkeypatch.setattr(series, "series_root", lambda: tmp_path)
    assert known_versions(SPECFORGE) == ["0.2.0", "0.9.1", "0.10.0"]


@pytest.mark.parametrize("version", known_versions(PACKAGES["sglang"]))
def test_the_installed_version_has_its_series(tmp_path: Path, version: str) -> None:
    target = write_wheel(tmp_path, "sglang", version, {"sglang/__init__.py": ""})
    command = ["patch", "status", "--package", "sglang", "--target", str(target), "--json"]
    report = json.loads(CliRunner().invoke(app, command).stdout)
    folder = ROOT / "patches/sglang" / version
    assert report["version"] == version
    assert [patch["name"] for patch in report["patches"]] == sorted(
        path.name for path in folder.glob("*.patch")
    )


@pytest.mark.parametrize("command", ["status", "check", "apply"])
def test_another_version_is_refused_by_name(tmp_path: Path, command: str) -> None:
    target = write_wheel(tmp_path, "sglang", "0.5.18", {"sglang/__init__.py": ""})
    options = ["--package", "sglang", "--target", str(target)]
    refused = CliRunner().invoke(app, ["patch", command, *options])
    assert refused.exit_code == 2
    assert "no patch series for SGLang 0.5.18; known versions: 0.5.14, 0.5.23" in refused.output
