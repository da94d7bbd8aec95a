"""The real series on the pristine wheel: every patch stands by itself, and all can be taken back.

The wheel comes from ``SPECFORGE_WHEEL`` (a path) or, once, from ``pip download``.
"""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
from patch_helpers import tree_hashes

from specforge_lk import patching

VERSION = "0.2.0"
SERIES = patching.load_series(VERSION)


@pytest.fixture(scope="session")
def wheel(request) -> Path:
    """The pristine wheel. Cached between runs; workers that run in parallel may both download."""
    if given := os.environ.get("SPECFORGE_WHEEL"):
        return Path(given)
    name = f"specforge-{VERSION}-py3-none-any.whl"
    cached = request.config.cache.mkdir("specforge-wheel") / name
    if not cached.is_file():
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
            done = subprocess.run([*pip, f"specforge=={VERSION}"], capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"set SPECFORGE_WHEEL to {name}, pip download failed: {done.stderr}")
            os.replace(Path(folder) / name, cached)
    return cached


@pytest.fixture
def tree(wheel, tmp_path) -> Path:
    """The wheel, unpacked."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "tree")
    return tmp_path / "tree"


def absent_from_wheel(root: Path, patch: patching.Patch) -> list[str]:
    """Files that the patch edits and only SpecForge's repository has, such as its own tests."""
    return sorted(
        path
        for path, kind in patch.changes.items()
        if kind != "add" and not path.startswith("specforge/") and not (root / path).exists()
    )


def apply_until(root: Path, last: patching.Patch) -> list[tuple[patching.Patch, list[str]]]:
    """Apply the series up to ``last``; returns each patch with the options that left files out."""
    done = []
    for patch in SERIES.patches:
        absent = absent_from_wheel(root, patch)
        options = [f"--exclude={path}" for path in absent]
        patching.git_apply(root, patch, None, *options)
        done.append((patch, options))
        if patch is last:
            if absent:
                warnings.warn(f"{patch.name}: left out {', '.join(absent)}", stacklevel=2)
            break
    return done


@pytest.mark.parametrize("patch", SERIES.patches, ids=lambda patch: patch.name)
def test_patch_compiles_and_passes_its_own_tests(tree, patch):
    """On top of the patches before it and without those after it."""
    apply_until(tree, patch)
    assert compileall.compile_dir(tree, quiet=1), f"{patch.name}: does not byte-compile"

    changed = [path for path in patch.changes if re.fullmatch(r"tests/(.+/)?test_\w+\.py", path)]
    assert changed, f"{patch.name} brings no tests of its own"
    # Packages, as in SpecForge's repository; a patch adds only those that are new there.
    for folder in {parent for path in changed for parent in (tree / path).parents}:
        if folder.is_relative_to(tree / "tests") and folder.is_dir():
            (folder / "__init__.py").touch()
    tests = [path for path in changed if (tree / path).is_file()]
    if not tests:
        pytest.skip(f"{patch.name} only edits tests that the wheel lacks")
    # The tree comes first, so that it shadows an installed SpecForge.
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without plug-ins: this project's needs the whole series.
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SPECFORGE_PLUGINS": ""}
    command = [sys.executable, "-m", "unittest", *tests]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, f"{patch.name}: {' '.join(tests)} failed\n{run.stdout}{run.stderr}"
    assert "Ran 0 tests" not in run.stderr, f"{patch.name}: {' '.join(tests)} holds no tests"


def test_reversing_every_patch_gives_the_wheel_back(tree):
    pristine = tree_hashes(tree)
    done = apply_until(tree, SERIES.patches[-1]) if SERIES.patches else []
    assert bool(done) == (tree_hashes(tree) != pristine)
    for patch, options in reversed(done):
        patching.git_apply(tree, patch, None, *options, "--reverse")
    assert tree_hashes(tree) == pristine


def test_apply_and_revert_give_the_wheel_back(tree):
    """The same through the public functions, as for an installed SpecForge."""
    pristine = tree_hashes(tree)
    target = patching.find_target(tree)
    assert patching.apply(target, SERIES).unchanged is False
    assert patching.status(target, SERIES) == patching.Status(patching.State.APPLIED, True)
    assert not (tree / "tests").exists()
    patching.revert(target)
    assert tree_hashes(tree) == pristine
