"""``patch apply`` and ``revert``, killed (SIGKILL) at any moment, leave the old tree, the new one,
or a state that ``status`` names; ``revert`` and ``apply`` recover from all of them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from subprocess import PIPE

import pytest
from killed import run_killed
from patch_helpers import FILES, tree_hashes, write_series, write_wheel
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.patching import SUPPORTED
from specforge_lk.patching import series as patching_series

LOSS = FILES["specforge/loss.py"]
#: Two series: files changed, added (one in a new directory) and deleted.
SERIES = {
    "earlier": {
        "specforge/loss.py": LOSS.replace("line6 = 6", "line6 = 66"),
        "specforge/losses/api.py": "api = 1\n",
        "specforge/old.py": None,
    },
    "series": {
        "specforge/loss.py": LOSS.replace("line9 = 9", "line9 = 99"),
        "specforge/plugins/api.py": "plugins = 1\n",
        "specforge/core/teacher.py": None,
    },
}
#: The command that is killed, and how many moments of it are tried.
MOMENTS = {"apply": 35, "revert": 30, "apply over an earlier series": 35}


@pytest.fixture(scope="module")
def series_roots(tmp_path_factory) -> dict[str, Path]:
    roots = {}
    for name, files in SERIES.items():
        roots[name] = tmp_path_factory.mktemp(name)
        work = tmp_path_factory.mktemp("authoring")
        write_series(roots[name] / "specforge/0.2.0", work, [("Change", files)])
    return roots


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """A kill, unlike a power cut, loses nothing written; syncing would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def patch(command: str, target: Path, *options: str):
    return CliRunner().invoke(app, ["patch", command, "--target", str(target), *options])


def everything(root: Path) -> dict[str, tuple]:
    """Every path with its kind, mode, time and content: what revert restores."""
    hashes = tree_hashes(root)
    return {
        path.relative_to(root).as_posix(): (
            hashes.get(path.relative_to(root).as_posix()),
            path.stat().st_mode,
            path.stat().st_mtime_ns if path.is_file() else None,
        )
        for path in root.rglob("*")
    }


def package(root: Path) -> dict[str, str]:
    """The package's own files: what runs."""
    hashes = tree_hashes(root)
    return {path: sha for path, sha in hashes.items() if ".specforge-lk/" not in path}


@pytest.mark.slow
@pytest.mark.parametrize("killed", MOMENTS)
def test_killed_before_a_change_of_a_file(killed, series_roots, tmp_path, monkeypatch):
    def use(series: str) -> None:
        monkeypatch.setattr(patching_series, "series_root", lambda: series_roots[series])

    original = write_wheel(tmp_path / "original")
    pristine = everything(original)
    use("series")
    new = shutil.copytree(original, tmp_path / "new")
    assert patch("apply", new).exit_code == 0
    old = shutil.copytree(original, tmp_path / "old")
    if killed != "apply":
        use("series" if killed == "revert" else "earlier")
        assert patch("apply", old).exit_code == 0
        use("series")
    ends = {
        "applied": [package(new)] + [package(old)] * (killed != "apply"),
        "pristine": [package(original)],
    }

    def run(target: Path, fatal: int) -> int:
        command = ["patch", killed.partition(" ")[0], "--target", str(target)]
        return run_killed(command, fatal, tmp_path / "total")

    whole = shutil.copytree(old, tmp_path / "whole")
    assert run(whole, fatal=-1) == 0
    assert package(whole) == package(original if killed == "revert" else new)
    total = int((tmp_path / "total").read_text())
    seen = set()
    for moment in random.Random(0).sample(range(total), min(MOMENTS[killed], total)):
        tree = shutil.copytree(old, tmp_path / f"killed-{moment}")
        assert run(tree, moment) == -signal.SIGKILL
        status = json.loads(patch("status", tree, "--json").stdout)
        if status["state"] != "partially applied":
            assert package(tree) in ends.get(status["state"], []), (moment, status)
        leftovers = everything(tree) != pristine
        if status["state"] == "pristine":
            assert (status["problem"] is not None) is leftovers, moment
        seen.add((status["state"], leftovers))

        again = shutil.copytree(tree, tmp_path / f"again-{moment}")
        assert patch("revert", tree).exit_code == 0, moment
        assert everything(tree) == pristine, moment
        assert patch("apply", again).exit_code == 0, moment
        assert package(again) == package(new), moment
        assert patch("revert", again).exit_code == 0, moment
        assert everything(again) == pristine, moment
    assert {("applied", True), ("partially applied", True), ("pristine", True)} <= seen


@pytest.mark.parametrize("killed", ["apply", "revert"])
def test_the_real_series_killed_by_the_clock(killed, pristine_wheel, tmp_path):
    """The command as a user runs it, on SpecForge's wheel, killed while it writes."""
    tree = tmp_path / "site-packages"
    zipfile.ZipFile(pristine_wheel(f"specforge=={SUPPORTED['specforge']}")).extractall(tree)
    pristine = tree_hashes(tree)
    writing = tree / "specforge/.specforge-lk" / ("." if killed == "apply" else "staged")

    def run(seconds: float | None) -> float:
        """Kill the command that long after it begins to write; returns how long it wrote."""
        command = [sys.executable, "-c", "from specforge_lk.cli import main; main()", "patch"]
        with subprocess.Popen([*command, killed, "--target", tree], stdout=PIPE) as process:
            while not writing.exists() and process.poll() is None:
                time.sleep(0.001)
            began = time.monotonic()
            try:
                assert process.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                process.kill()
            return time.monotonic() - began

    def begin() -> None:
        assert patch("apply" if killed == "revert" else "revert", tree).exit_code == 0

    begin()
    whole = run(None)
    for share in (0.0, 0.4, 0.8):
        begin()
        run(share * whole)
        state = json.loads(patch("status", tree, "--json").stdout)["state"]
        assert state in ("pristine", "partially applied", "applied"), share
        assert patch("revert", tree).exit_code == 0
        assert tree_hashes(tree) == pristine
