"""Patch handling on a tiny SpecForge: all or nothing, idempotent, reverted byte for byte."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from patch_helpers import FILES, tree_hashes, write_checkout, write_series, write_tree, write_wheel
from typer.testing import CliRunner

from specforge_lk import patching
from specforge_lk.cli import app
from specforge_lk.patching import series

LOSS = FILES["specforge/loss.py"]
STEPS = [
    (
        "Fix the loss",
        {
            "specforge/loss.py": LOSS.replace("line6 = 6", "line6 = 66"),
            "specforge/losses/api.py": "api = 1\n",
            "tests/test_loss.py": "assert True\n",
        },
    ),
    (
        "Add plug-ins and drop the old module",
        {
            "specforge/losses/api.py": "api = 2\n",
            "specforge/plugins.py": "plugins = ()\n",
            "specforge/old.py": None,
        },
    ),
]


@pytest.fixture(autouse=True)
def series_root(tmp_path, monkeypatch):
    root = tmp_path / "patches"
    write_series(root / "specforge/0.2.0", tmp_path / "authoring", STEPS)
    monkeypatch.setattr(series, "series_root", lambda: root)
    return root


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(tmp_path / "site-packages")


@pytest.fixture
def checkout(tmp_path):
    return write_checkout(tmp_path / "checkout")


def patch(command: str, target: Path, *options: str):
    """Run the real command; everything it says is in ``output``."""
    return CliRunner().invoke(app, ["patch", command, "--target", str(target), *options])


def state(target: Path) -> dict:
    return json.loads(patch("status", target, "--json").stdout)


def test_apply_writes_the_series_and_revert_restores_every_byte(wheel):
    # A directory that pip's own tests may leave beside the package is nobody's checkout.
    write_tree(wheel, {"tests/stray.py": "", "specforge/__pycache__/loss.cpython-311.pyc": "pip's"})
    (wheel / "specforge/loss.py").chmod(0o640)
    os.utime(wheel / "specforge/loss.py", ns=(10**18, 10**18))
    before, stat = tree_hashes(wheel), (wheel / "specforge/loss.py").stat()

    assert state(wheel)["state"] == "pristine"
    assert patch("check", wheel).exit_code == 0
    assert tree_hashes(wheel) == before

    assert patch("apply", wheel).exit_code == 0
    after = tree_hashes(wheel)
    assert (wheel / "specforge/loss.py").read_text() == STEPS[0][1]["specforge/loss.py"]
    assert (wheel / "specforge/losses/api.py").read_text() == "api = 2\n"
    assert not (wheel / "specforge/old.py").exists()
    assert not (wheel / "tests/test_loss.py").exists()
    assert (wheel / "specforge/loss.py").stat().st_mode == stat.st_mode
    report = state(wheel)
    assert (report["state"], report["current"]) == ("applied", True)
    assert [entry["subject"] for entry in report["patches"]] == [subject for subject, _ in STEPS]

    again = patch("apply", wheel)
    assert again.exit_code == 0
    assert "already applied" in again.output
    assert patch("check", wheel).exit_code == 0
    assert tree_hashes(wheel) == after

    write_tree(wheel, {"specforge/losses/__pycache__/api.cpython-311.pyc": "compiled"})
    assert patch("revert", wheel).exit_code == 0
    assert tree_hashes(wheel) == before
    assert not (wheel / "specforge/losses").exists()
    restored = (wheel / "specforge/loss.py").stat()
    assert (restored.st_mode, restored.st_mtime_ns) == (stat.st_mode, stat.st_mtime_ns)
    assert "nothing to do" in patch("revert", wheel).output


@pytest.mark.parametrize("path", ["specforge/loss.py", "specforge/plugins.py"])
def test_edits_of_an_installed_wheel_are_refused_by_name(wheel, path):
    """Even an edit far from every hunk, which git accepts; and a file that the series would add."""
    edited = FILES.get(path, "line11 = 11\n").replace("line11 = 11", "line11 = 'mine'")
    write_tree(wheel, {path: edited})
    before = tree_hashes(wheel)
    for command in ("apply", "check"):
        result = patch(command, wheel)
        assert result.exit_code == 1
        assert f"foreign edits in {path}: " in result.output
    assert tree_hashes(wheel) == before
    report = state(wheel)
    assert report["state"] == "foreign edits"
    assert path in report["problem"]


def test_no_fuzz_in_a_checkout(checkout):
    """A changed context line three lines from the change refuses the whole series."""
    loss = checkout / "specforge/loss.py"
    loss.write_text(loss.read_text().replace("line3 = 3", "line3 = 30"))
    before = tree_hashes(checkout)
    result = patch("apply", checkout)
    assert result.exit_code == 1
    assert "0001-Fix-the-loss.patch" in result.output
    assert "specforge/loss.py" in result.output
    assert tree_hashes(checkout) == before


def test_line_ends_of_windows_are_named(checkout, wheel, series_root):
    """A clone with core.autocrlf=true, of this project or of SpecForge."""
    loss = checkout / "specforge/loss.py"
    loss.write_bytes(loss.read_bytes().replace(b"\n", b"\r\n"))
    before = tree_hashes(checkout)
    refused = patch("apply", checkout)
    assert refused.exit_code == 1 and tree_hashes(checkout) == before
    assert "specforge/loss.py: their line ends are CRLF" in refused.output, refused.output
    assert "core.autocrlf=false" in refused.output

    for path in (series_root / "specforge/0.2.0").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = tree_hashes(wheel)
    for command in ("apply", "check", "status"):
        refused = patch(command, wheel)
        assert refused.exit_code == 2 and tree_hashes(wheel) == before
        assert "0001-Fix-the-loss.patch has CRLF line ends" in refused.output
        assert "git checkout -- patches" in refused.output


def test_a_checkout_has_the_line_ends_that_patches_need(tmp_path):
    """Whatever core.autocrlf says: .gitattributes decides."""
    root = Path(patching.__file__).parents[2]
    clone, git = tmp_path / "clone", ("git", "-c", "core.autocrlf=true", "-C")
    (clone / "patches").mkdir(parents=True)
    for name in (".gitattributes", "patches/specforge/0.2.0/series", "Makefile"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((root / name).read_bytes())
    (clone / "patches/a.patch").write_bytes(b"unix\ndos\r\n")
    subprocess.run([*git, clone, "init", "-q"], check=True)
    subprocess.run([*git, clone, "add", "."], check=True)
    for name in ("Makefile", "patches/a.patch"):
        content = (clone / name).read_bytes()
        (clone / name).unlink()
        subprocess.run([*git, clone, "checkout", "-q", "--", name], check=True)
        assert (clone / name).read_bytes() == content


def test_check_names_each_patch(checkout):
    (checkout / "specforge/plugins.py").write_text("mine = 1\n")
    result = patch("check", checkout)
    assert result.exit_code == 1
    assert "OK      0001-Fix-the-loss.patch" in result.output
    assert "failed  0002-" in result.output
    assert "specforge/plugins.py: already exists" in result.output


@pytest.mark.parametrize(
    ("options", "expected"), [((), True), (("--tests",), True), (("--no-tests",), False)]
)
def test_tests_hunks_of_a_checkout(checkout, options, expected):
    before = tree_hashes(checkout)
    assert patch("apply", checkout, *options).exit_code == 0
    assert (checkout / "tests/test_loss.py").exists() is expected
    assert patch("revert", checkout).exit_code == 0
    assert tree_hashes(checkout) == before


def test_tests_hunks_of_an_unpacked_wheel_on_request(wheel):
    before = tree_hashes(wheel)
    assert patch("apply", wheel, "--tests").exit_code == 0
    assert (wheel / "tests/test_loss.py").exists()
    assert "already applied" in patch("apply", wheel).output
    assert "reverted an earlier series" in patch("apply", wheel, "--no-tests").output
    assert not (wheel / "tests").exists()
    assert patch("revert", wheel).exit_code == 0
    assert tree_hashes(wheel) == before


def test_a_checkout_deep_inside_another_repository(tmp_path, monkeypatch):
    """There ``git apply`` skips every path and reports success, unless it is isolated."""
    subprocess.run(["git", "init", "-q", str(tmp_path / "outer")], check=True)
    (tmp_path / "outer/tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "outer/tmp"))
    checkout = write_checkout(tmp_path / "outer/vendor/specforge-src")
    assert patch("apply", checkout).exit_code == 0
    assert "line6 = 66" in (checkout / "specforge/loss.py").read_text()
    untracked = ["git", "status", "--porcelain", "-uall"]
    listed = subprocess.run(untracked, cwd=checkout, check=True, capture_output=True, text=True)
    assert ".specforge-lk" not in listed.stdout


def test_a_full_disk_in_revert_is_recovered(wheel, monkeypatch):
    before = tree_hashes(wheel)
    patch("apply", wheel)
    with monkeypatch.context() as crashing:
        crashing.setattr(os, "replace", Mock(side_effect=OSError("disk")))
        failed = patch("revert", wheel)
    assert failed.exit_code == 1
    assert "disk" in failed.output
    assert patch("revert", wheel).exit_code == 0
    assert tree_hashes(wheel) == before


def test_revert_refuses_later_edits_unless_forced(wheel):
    before = tree_hashes(wheel)
    patch("apply", wheel)
    (wheel / "specforge/plugins.py").write_text("edited = 1\n")
    edited = tree_hashes(wheel)
    for command in ("revert", "apply"):
        result = patch(command, wheel)
        assert result.exit_code == 1
        assert "specforge/plugins.py" in result.output
        assert "specforge/loss.py" not in result.output
    assert tree_hashes(wheel) == edited
    assert state(wheel)["state"] == "foreign edits"
    assert patch("revert", wheel, "--force").exit_code == 0
    assert tree_hashes(wheel) == before


def test_a_newer_series_replaces_the_applied_one(wheel, series_root, tmp_path):
    before = tree_hashes(wheel)
    patch("apply", wheel)
    newer = [("Another fix", {"specforge/loss.py": LOSS.replace("line9 = 9", "line9 = 99")})]
    write_series(series_root / "specforge/0.2.0", tmp_path / "authoring2", newer)
    assert state(wheel)["current"] is False
    assert "reverted an earlier series first" in patch("apply", wheel).output
    assert (wheel / "specforge/loss.py").read_text() == newer[0][1]["specforge/loss.py"]
    assert not (wheel / "specforge/plugins.py").exists()
    assert patch("revert", wheel).exit_code == 0
    assert tree_hashes(wheel) == before


def test_a_newer_series_that_fails_leaves_the_applied_one(wheel, series_root):
    patch("apply", wheel)
    before = tree_hashes(wheel)
    first = next((series_root / "specforge/0.2.0").glob("0001*"))
    first.write_text(first.read_text().replace("-line6 = 6", "-line6 = 7"))
    assert patch("apply", wheel).exit_code == 1
    assert tree_hashes(wheel) == before


def test_a_reinstall_over_an_applied_series_can_be_patched_again(wheel):
    """``pip install --force-reinstall`` rewrites its own files and leaves the added ones."""
    patch("apply", wheel)
    write_wheel(wheel)
    assert state(wheel)["state"] == "partially applied"
    assert patch("apply", wheel).exit_code == 0
    assert state(wheel)["state"] == "applied"


def test_unknown_version_and_missing_package_are_named(checkout, tmp_path):
    (checkout / "version.txt").write_text("0.3.0\n")
    result = patch("apply", checkout)
    assert result.exit_code == 2
    assert "0.3.0" in result.output
    assert "known versions: 0.2.0" in result.output
    empty = patch("status", tmp_path)
    assert empty.exit_code == 2
    assert "specforge/" in empty.output


def test_missing_git_is_named(wheel, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = patch("apply", wheel)
    assert result.exit_code == 2
    assert "install git" in result.output


def test_revert_says_that_it_removed_what_an_interrupted_command_left(wheel):
    before = tree_hashes(wheel)
    write_tree(wheel, {"specforge/.specforge-lk/staged/specforge/loss.py": "torn"})
    assert state(wheel)["problem"]
    assert "left by an interrupted command" in patch("revert", wheel).output
    assert tree_hashes(wheel) == before
    assert "nothing to do" in patch("revert", wheel).output


def test_a_damaged_manifest_is_named_and_nothing_is_touched(wheel):
    patch("apply", wheel)
    manifest = wheel / "specforge/.specforge-lk/manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    before = tree_hashes(wheel)
    for command in ("status", "apply", "revert"):
        result = patch(command, wheel)
        assert result.exit_code == 1
        assert f"{manifest} is damaged" in result.output
    assert tree_hashes(wheel) == before


def test_commands_on_one_target_wait_for_each_other(wheel):
    directory = os.open(wheel / "specforge", os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    found = patching.find_installation(patching.SPECFORGE, wheel)
    series = patching.load_series(found.package, found.version)
    with ThreadPoolExecutor() as pool:
        first, second = (pool.submit(patching.apply, found, series) for _ in range(2))
        with pytest.raises(TimeoutError):
            first.result(timeout=0.3)
        os.close(directory)
        assert {first.result().unchanged, second.result().unchanged} == {False, True}


@pytest.mark.parametrize("layout", ["wheel", "checkout"])
def test_another_package_whose_repository_has_it_in_a_directory(tmp_path, series_root, layout):
    """SGLang's patches say python/sglang; site-packages have sglang. Its tests are in test/."""
    base = {"python/sglang/worker.py": "".join(f"line{i} = {i}\n" for i in range(9))}
    fixed = {
        "python/sglang/worker.py": base["python/sglang/worker.py"].replace("4 = 4", "4 = 44"),
        "python/sglang/added/__init__.py": "",
        "test/test_worker.py": "assert True\n",
    }
    write_series(series_root / "sglang/0.5.14", tmp_path / "sglang", [("Fix", fixed)], base)
    package, target = base | {"python/sglang/__init__.py": ""}, tmp_path / "target"
    if layout == "wheel":
        write_wheel(
            target, "sglang", "0.5.14", {p.removeprefix("python/"): package[p] for p in package}
        )
    else:
        project = '[project]\nname = "sglang"\ndynamic = ["version"]\n'
        scm = '[tool.setuptools_scm]\nversion_file = "sglang/_version.py"\n'
        version = {"python/sglang/_version.py": "__version__ = version = '0.5.14'\n"}
        write_tree(target, package | version | {"python/pyproject.toml": project + scm})
        (target / "test").mkdir()
    before = tree_hashes(target)

    sglang = ("--package", "sglang")
    assert patch("check", target, *sglang).exit_code == 0
    assert patch("apply", target, *sglang).exit_code == 0
    source = target / ("sglang" if layout == "wheel" else "python/sglang")
    assert (source / "worker.py").read_text() == fixed["python/sglang/worker.py"]
    assert (source / "added/__init__.py").exists()
    assert (target / "test/test_worker.py").exists() is (layout == "checkout")
    report = json.loads(patch("status", target, *sglang, "--json").stdout)
    assert (report["package"], report["state"], report["current"]) == ("sglang", "applied", True)
    assert patch("revert", target, *sglang).exit_code == 0
    assert tree_hashes(target) == before
    assert "directory that contains specforge/" in patch("status", target).output


def test_a_checkout_without_its_version_file_is_named(tmp_path):
    scm = '[project]\nname = "sglang"\n[tool.setuptools_scm]\nversion_file = "sglang/_version.py"\n'
    write_tree(tmp_path, {"python/sglang/__init__.py": "", "python/pyproject.toml": scm})
    result = patch("status", tmp_path, "--package", "sglang")
    assert result.exit_code == 2
    assert f"{tmp_path}/python/sglang/_version.py: no __version__" in result.output


def only_specforge_is(directory, monkeypatch):
    monkeypatch.delitem(sys.modules, "specforge", raising=False)  # another test may import it
    monkeypatch.syspath_prepend(str(directory))


def test_the_default_target_is_found_without_importing_it(wheel, monkeypatch):
    write_tree(wheel, {"specforge/__init__.py": "raise RuntimeError('imported')\n"})
    only_specforge_is(wheel, monkeypatch)
    monkeypatch.setattr("sys.prefix", str(wheel.parent))
    assert patching.find_installation(patching.SPECFORGE).root == wheel.resolve()


def test_another_environment_is_never_the_default_target(wheel, monkeypatch, tmp_path):
    """A .pth file or --system-site-packages shows a SpecForge that is not this environment's."""
    only_specforge_is(wheel, monkeypatch)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "venv"))
    before = tree_hashes(wheel)
    result = CliRunner().invoke(app, ["patch", "apply"])
    assert result.exit_code == 2
    assert f"--target {wheel}" in result.output
    assert tree_hashes(wheel) == before
